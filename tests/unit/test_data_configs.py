"""The shipped configs: valid, complete, and with the settings that were published."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from rayrlhf.config_file import load_config
from rayrlhf.config_rl import PPOConfig
from rayrlhf.data.formats import FORMATS
from rayrlhf.data.loading import Split
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import check_context
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.rewards.labellers import LABELLERS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SPLITS: tuple[Split, ...] = ("train", "valid")
CONTEXT = {
    "embedded:opt-tiny": 256,
    "embedded:opt-7m": 768,
    "facebook/opt-125m": 2048,
    "facebook/opt-1.3b": 2048,
    "build/smollm2": 8192,
}
"""Tokens; opt-tiny's positions beyond 256 are untrained."""


def test_all_examples_are_there() -> None:
    assert {path.name for path in CONFIGS} >= {
        "quickstart.yaml",
        "tldr_opt_125m.yaml",
        "hh_rlhf_opt_1b.yaml",
        "hh_harmless_tiny.yaml",
        "showcase.yaml",
    }
    assert AutoConfig.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny").max_position_embeddings >= 256


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid_and_names_what_exists(path: Path) -> None:
    config = load_config(path)
    demonstrations, comparisons = config.data.demonstrations, config.data.comparisons or ()
    assert all(FORMATS[str(source.format)].demonstration for source in demonstrations)
    assert all(FORMATS[str(source.format)].comparison for source in comparisons)
    assert config.collect.labeller.kind in LABELLERS
    # Without comparisons of its own, a reward model needs a share of the posts.
    given = config.data.comparisons is not None or not config.trains_reward_model
    assert given or config.data.reward_model_fraction > 0
    check_context(config.data.max_prompt_tokens, config.data.max_response_tokens, CONTEXT[config.model.path])


@pytest.mark.parametrize("name", ["arithmetic", "guess"])
def test_the_scripts_write_what_the_configs_read(name: str, tmp_path: Path) -> None:
    config, file = load_config(ROOT / f"configs/{name}.yaml"), tmp_path / "rows.jsonl"
    subprocess.run([sys.executable, ROOT / f"scripts/make_{name}.py", file], check=True)
    sources = [config.data.demonstrations[0].model_copy(update={"path": str(file)})]
    tokenizer = load_tokenizer(resolve_model(config.model.path))
    found = {split: read_demonstrations(sources, split, tokenizer, config.data.max_prompt_tokens) for split in SPLITS}
    assert len(found["train"]) > 1500 and found["valid"]
    assert all(each.response.isdigit() for each in found["train"])


def test_quickstart_needs_nothing_but_two_cores() -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    assert config.model.path.startswith("embedded:") and config.data.demonstrations[0].path.startswith("embedded:")
    roles = (config.resources.generators, config.resources.scorers, config.resources.learner)
    assert all(role.gpus == 0 for role in roles) and sum(role.cpus for role in roles) <= 2


def test_tldr_has_the_published_settings() -> None:
    """Huang et al. 2024, The N+ Implementation Details of RLHF with PPO."""
    config = load_config(ROOT / "configs/tldr_opt_125m.yaml")
    rl = config.rl
    assert isinstance(rl, PPOConfig)
    assert {config.sft.optimizer, config.reward_model.optimizer, rl.optimizer} == {rl.optimizer}
    assert (rl.optimizer.lr, rl.optimizer.eps, rl.optimizer.weight_decay) == (3e-6, 1e-5, 0.0)
    assert (rl.optimizer.schedule, rl.optimizer.max_grad_norm) == ("linear", 1.0)
    assert (config.sft.batch_size, config.reward_model.prompts_per_batch, config.reward_model.epochs) == (128, 64, 1)
    assert rl.prompts_per_step * rl.samples_per_prompt == 512 and rl.steps * 512 == pytest.approx(1e6, rel=1e-3)
    assert (rl.epochs, rl.minibatches, rl.temperature) == (4, 1, 0.7)
    assert (rl.clip_range, rl.value_clip_range, rl.value_coefficient) == (0.2, 0.2, 0.1)
    assert (rl.gamma, rl.lam, rl.missing_eos_reward) == (1.0, 0.95, -1.0)
    assert (rl.kl.coefficient, rl.kl.adaptive) == (0.05, False)
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (512, 53)
