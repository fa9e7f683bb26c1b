"""`make showcase` on the real SmolLM2, with a few prompts and two steps."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.data.comparisons import read_ranked
from rayrlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = "configs/showcase.yaml"

pytestmark = pytest.mark.long  # a model of 135 million parameters is converted, loaded six times, and trained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `make showcase` writes it."""
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    for _ in range(2):  # the second call finds it there
        said = subprocess.run(
            [sys.executable, ROOT / "scripts/showcase_model.py", directory], check=True, capture_output=True, text=True
        ).stdout
    assert said == f"{directory} is there already\n"
    return directory


def test_the_model_has_the_numbers_of_the_gguf_file(model: Path) -> None:
    """Of a matrix in 4 bits, of one that llama.cpp keeps in another order, and of one that is not quantised.

    `gguf` takes the bits apart; the order of the rows of queries is undone as llama.cpp's converter made it: pairs of
    rotary dimensions stand beside each other there, and half a head apart here.
    """
    from gguf import GGUFReader, dequantize

    file = runpy.run_path(str(ROOT / "scripts/showcase_model.py"))["gguf_file"]()
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    kinds, saved = {tensor.tensor_type.name for tensor in found.values()}, load_file(model / "model.safetensors")
    assert "Q4_1" in kinds

    def numbers(name: str) -> torch.Tensor:
        return torch.tensor(dequantize(found[name].data, found[name].tensor_type))

    for layer in (0, 29):
        ours = f"model.layers.{layer}"
        assert torch.equal(saved[f"{ours}.mlp.up_proj.weight"], numbers(f"blk.{layer}.ffn_up.weight"))
        assert torch.equal(saved[f"{ours}.input_layernorm.weight"], numbers(f"blk.{layer}.attn_norm.weight"))
        queries = numbers(f"blk.{layer}.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
        assert torch.equal(saved[f"{ours}.self_attn.q_proj.weight"], queries)


def test_the_model_writes_english(model: Path) -> None:
    tokenizer, smollm2 = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)

    def mean_logprob(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return -float(smollm2(ids, labels=ids).loss)

    def greedy(**prompt: torch.Tensor) -> str:
        ids = smollm2.generate(**prompt, do_sample=False, max_new_tokens=12)[0]
        return str(tokenizer.decode(ids[prompt["input_ids"].shape[1] :]))

    sentence = "The children walked home through the rain and their mother made them a cup of tea."
    assert mean_logprob(sentence) > -4.0 > -6.0 > mean_logprob(" ".join(sorted(sentence.split())))
    assert "Paris" in greedy(**tokenizer("The capital of France is", return_tensors="pt"))
    turn = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in greedy(**asked)


def test_the_lexicon_ranks_and_rl_sees_the_reward_model_alone(model: Path, tmp_path: Path, start: Any) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/make_openings.py", tmp_path / "openings"], check=True)
    changes = [f"model.path={model}", f"sft.from={model}", f"data.demonstrations.path={tmp_path / 'openings'}"]
    changes += ["collect.prompts=12", "collect.answers_per_prompt=3", "rl.steps=2", "rl.prompts_per_step=4"]
    changes += ["evaluate.max_prompts=8", "rl.sample_prompts=2", f"runs_dir={tmp_path}"]
    # On a busy machine two threads wait for each other at every layer.
    changes += [f"resources.{role}.threads=1" for role in ("generators", "scorers", "learner")]
    outcome = start("python", "-m", "jobs.pipeline", "--local", "--config", CONFIG, *changes).wait()
    assert outcome.code == 0, outcome.err
    positive = runpy.run_path(str(ROOT / "configs/positive.py"))["positive"]
    run = tmp_path / "showcase"
    for each in read_ranked(run / "comparisons.parquet"):
        assert each.scores == pytest.approx(positive(each.responses))
        assert list(each.scores or ()) == sorted(each.scores or (), reverse=True)
    steps = read_metrics(run, "rl")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert 12 <= line["rl/length/mean"] <= 20 and -1 <= line["rl/gold/mean"] <= 1
        # Score and penalty, and nothing of gold.
        penalty = line["rl/kl_coefficient"] * line["rl/kl"]
        assert line["rl/reward/mean"] == pytest.approx(line["rl/score/mean"] - penalty, abs=1e-5)
        assert line["rl/first_ratio_off_one"] < 1e-5 and line["rl/logprob_gap/max"] < 1e-3
    samples = pq.read_table(run / "samples.parquet").to_pylist()
    assert len(samples) == 8
    for row in samples:
        for name in ("sft", "policy"):
            assert row[f"gold_{name}"] == pytest.approx(positive([row[name]])[0])
    assert math.isfinite(json.loads((run / "evaluation.json").read_text())["policy"]["kl"]["mean"])
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts/showcase_answers.py", CONFIG, f"runs_dir={tmp_path}", "--markdown"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert len(shown.splitlines()) == 2 + 4
