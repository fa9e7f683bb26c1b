"""Code of the user's own: the recipe of docs/extending.md, carried out as printed, and what goes wrong in one line."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.algorithms.registry import make_algorithm, make_trainer, read_plugin
from rayrlhf.config_file import parse_config
from rayrlhf.config_rl import RLConfig
from rayrlhf.errors import UserError
from rayrlhf.models.ranks import Ranks
from tests.tiny import forward_of, sample_of, tiny_models

PAGE = Path(__file__).parents[2] / "docs/extending.md"


def config_of(path: Path, name: str, algorithm: str = "custom") -> RLConfig:
    section: dict[str, Any] = {"algorithm": algorithm, "samples_per_prompt": 4, "epochs": 1}
    if algorithm.startswith("custom"):
        section |= {"path": f"{path}:{name}", "settings": {"scale": 2.0}}
    section |= {"temperature": 1.0, "missing_eos_reward": None, "kl": {"coefficient": 0.0}}
    section["optimizer"] = {"lr": 1e-2, "schedule": "constant"}
    return parse_config({"name": "run", "rl": section}, "test").rl


def test_the_algorithm_of_the_page_learns(tmp_path: Path) -> None:
    recipe = PAGE.read_text(encoding="utf-8").split("## An algorithm\n")[1]
    code = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)[0]
    assert len(code.splitlines()) <= 60
    file = tmp_path / "rank.py"
    file.write_text(code)
    config = config_of(file, "Rank")
    plugin = read_plugin(config)
    file.unlink()  # the learner's node has none
    policy, _ = tiny_models(hidden=16)
    trainer = make_trainer(config, forward_of(policy), None, Ranks(1), max_response_tokens=6, seed=0, plugin=plugin)
    generator = torch.Generator().manual_seed(0)
    means = []
    for step in range(15):
        batch = [sample_of(policy, f"p{i // 4}", i % 4, generator) for i in range(16)]
        if step == 0:
            experience, _ = trainer.make_experience(batch)
            scores = [sum(t.rewards.values()) for t in batch[:4]]
            best, worst = int(np.argmax(scores)), int(np.argmin(scores))
            assert len(set(scores)) > 1, "equal scores would show nothing"
            assert experience[best].fixed.advantages[0] > 0 > experience[worst].fixed.advantages[0]
            assert max(abs(float(e.fixed.advantages[0])) for e in experience) <= 2.0
        means.append(trainer.step(batch, step)["rl/score/mean"])
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.5, means


def test_an_algorithm_with_a_critic_does_what_ppo_does(tmp_path: Path) -> None:
    recipe = PAGE.read_text(encoding="utf-8").split("## An algorithm\n")[1]
    code, method = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)[:2]
    imports = "from rayrlhf.algorithms.advantages import generalized_advantages, kl_penalised_rewards\n"
    file = tmp_path / "mine.py"
    file.write_text(f"{code}\n\n{imports}\nclass Mine(Rank):\n{textwrap.indent(method, '    ')}")
    mine = config_of(file, "Mine", "custom_with_critic")
    ppo = config_of(file, "Mine", "ppo").model_copy(update={"lam": 1.0, "whiten_advantages": False})
    found = []
    for config in (mine, ppo):
        policy, value_model = tiny_models(hidden=16)
        trainer = make_trainer(
            config, forward_of(policy), forward_of(value_model), Ranks(1), max_response_tokens=6, seed=0,
            plugin=read_plugin(config),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        metrics = [trainer.step([sample_of(policy, f"p{i}", 0, generator) for i in range(8)], i) for i in range(3)]
        weights = [*policy.parameters(), *value_model.parameters()]
        found.append((metrics, torch.cat([weight.detach().flatten() for weight in weights])))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert found[0][0][0]["rl/value_loss"] > 0


def test_an_algorithm_with_a_critic_gives_returns(tmp_path: Path) -> None:
    recipe = PAGE.read_text(encoding="utf-8").split("## An algorithm\n")[1]
    file = tmp_path / "rank.py"
    file.write_text(re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)[0])
    config = config_of(file, "Rank", "custom_with_critic")
    policy, value_model = tiny_models(hidden=16)
    trainer = make_trainer(
        config, forward_of(policy), forward_of(value_model), Ranks(1), max_response_tokens=6, seed=0,
        plugin=read_plugin(config),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match=r"Rank\.advantages gave no returns, which the critic learns from"):
        trainer.step([sample_of(policy, "p0", i, generator) for i in range(4)], 0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\nimport nothing_of_this_name\n", "mine.py line 2: ModuleNotFoundError: No module named"),
        ("class Other: pass\n", "mine.py has no 'Mine'"),
        ("def Mine(config):\n    raise KeyError('scale')\n", "Mine(config) raised KeyError: 'scale'"),
        ("class Mine:\n    def __init__(self, config): pass\n    advantages = print\n", "has no method policy_loss"),
        ("class Mine(:\n", "mine.py"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, code: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    config = config_of(file, "Mine")
    with pytest.raises(UserError) as raised:
        make_algorithm(config, read_plugin(config))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rl\.path: .*none\.py cannot be read"):
        read_plugin(config_of(tmp_path / "none.py", "Mine"))
    with pytest.raises(UserError, match=r"'rl\.path'"):
        config_of(tmp_path / "none", "Mine")
