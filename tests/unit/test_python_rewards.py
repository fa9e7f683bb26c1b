"""Rewards by functions in files of the user's own: what they are told, what they may return, and what goes wrong."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.config import Config
from rayrlhf.config_dpo import SimPOConfig
from rayrlhf.config_file import parse_config
from rayrlhf.config_rewards import PythonReward
from rayrlhf.data.records import Prompt
from rayrlhf.data.splits import split_train
from rayrlhf.data.tokens import encode_responses
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.rewards.functions import scores
from rayrlhf.rewards.texts import TextRewards, make_text_rewards
from rayrlhf.rewards.verifiable import valid_json
from rayrlhf.runs.stages import stages_from, stages_of
from rayrlhf.trajectory import Trajectory
from rayrlhf.yaml_text import read_yaml_text

PAGE = Path(__file__).parents[2] / "docs/extending.md"
TEXTS = ["a cat slept", "no", "a dog barked at a cat"]
PROMPTS = [
    Prompt("p0", "What?", "a cat slept", metadata={"animals": ["cat", "dog"], "points": 2}),
    Prompt("p1", "And then?", None, metadata={"animals": ["dog", "cat"], "points": 5}),
]
OWNERS = ["p0", "p0", "p1"]


def config_of(tmp_path: Path, code: str, **more: Any) -> Config:
    """A run with the reward model and `score` of a file with this code."""
    (tmp_path / "mine.py").write_text(code)
    own = {"kind": "python", "name": "mine", "path": f"{tmp_path}/mine.py:score", **more}
    return parse_config({"name": "run", "rewards": [{"kind": "model"}, own]}, "test")


def trajectories() -> list[Trajectory]:
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    found = []
    for i, (owner, ids) in enumerate(zip(OWNERS, encode_responses(tokenizer, TEXTS, 20, [""] * 3), strict=True)):
        response, prompt = np.array(ids), np.array([5, 6])
        logprobs = np.zeros(len(ids), np.float32)
        found.append(Trajectory(owner, i, 0, prompt, response, logprobs, np.zeros(len(ids), np.int64), "eos"))
    return found


def rewards_of(config: Config) -> TextRewards:
    """As a scorer gets them: pickled."""
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    found: TextRewards = pickle.loads(pickle.dumps(TextRewards(make_text_rewards(config.rewards), PROMPTS, tokenizer)))
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def score(responses):\n    return [len(text) for text in responses]\n", [11.0, 2.0, 21.0]),
        ("def score(prompts, responses):\n    return [len(p) for p in prompts]\n", [5.0, 5.0, 9.0]),
        (
            "def score(responses, references):\n"
            "    return [r == t for r, t in zip(references, responses)]\n",
            [1.0, 0.0, 0.0],
        ),
        (
            "def score(responses, metadata):\n"
            "    return [m['points'] * (m['animals'][0] in r) for r, m in zip(responses, metadata)]\n",
            [2.0, 0.0, 5.0],
        ),
        ("import numpy as np\ndef score(**told):\n    return np.ones(len(told['token_ids']))\n", [1.0, 1.0, 1.0]),
        (
            "import asyncio\n"
            "async def score(responses):\n"
            "    await asyncio.sleep(0)\n"
            "    return [0.5 for _ in responses]\n",
            [0.5, 0.5, 0.5],
        ),
    ],
)  # fmt: skip
def test_a_function_asks_for_what_it_needs(tmp_path: Path, code: str, expected: list[float]) -> None:
    config = config_of(tmp_path, code, weight=2.0)
    assert rewards_of(config)(trajectories()) == {"mine": [2.0 * score for score in expected]}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("exact", {}, [1.0, 0.0, 0.0]),
        ("contains", {}, [1.0, 0.0, 0.0]),
        ("matches", {"pattern": "a (cat|dog) .*"}, [1.0, 0.0, 1.0]),
        ("length", {"most": 4}, None),
        ("valid_json", {}, [0.0, 0.0, 0.0]),
    ],
)
def test_rules_that_are_there(name: str, settings: dict[str, Any], expected: list[float] | None) -> None:
    section = {"kind": "python", "name": name, "path": f"rayrlhf.rewards.verifiable:{name}", "settings": settings}
    config = parse_config({"name": "run", "rewards": [section]}, "test")
    lengths = [float(len(t.response_ids) <= 4) for t in trajectories()]
    assert rewards_of(config)(trajectories()) == {name: lengths if expected is None else expected}


def test_json_is_a_value() -> None:
    assert valid_json(['{"a": [1, 2]}', " 3 ", '"text"', "{a: 1}", ""]) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_settings_are_arguments(tmp_path: Path) -> None:
    code = "def score(responses, word, bonus=1.0):\n    return [bonus * text.count(word) for text in responses]\n"
    config = config_of(tmp_path, code, settings={"word": "cat", "bonus": 3.0})
    assert rewards_of(config)(trajectories()) == {"mine": [3.0, 0.0, 3.0]}


def test_the_reward_of_the_page_is_added_to_the_model_s(tmp_path: Path) -> None:
    recipe = PAGE.read_text(encoding="utf-8").split("## A reward\n")[1]
    code = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)[0]
    assert len(code.splitlines()) <= 10
    (tmp_path / "brevity.py").write_text(code)
    yaml = re.findall(r"```yaml\n(.*?)```", recipe, re.DOTALL)[0].replace("brevity.py", str(tmp_path / "brevity.py"))
    file = tmp_path / "run.yaml"
    file.write_text(f"name: run\n{yaml}")
    from rayrlhf.config_file import load_config

    config = load_config(file)
    scored = trajectories()
    lengths = [len(t.response_ids) for t in scored]
    for trajectory, brevity in zip(scored, rewards_of(config)(scored)["brevity"], strict=True):
        trajectory.rewards = {"reward_model": 1.0, "brevity": brevity}
    expected = [1.0 + 0.5 * -abs(length - 24) / 24 for length in lengths]
    assert scores(scored, None).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("code", "more", "said"),
    [
        (
            "def score(answers): return []\n",
            {},
            "asks for answers; there are prompts, responses, references, metadata, token_ids",
        ),
        ("def score(responses): return []\n", {"settings": {"word": "x"}}, "does not take word of its `settings`"),
        ("score = 3\n", {}, "mine.py:score) is no function"),
        ("def other(responses): return []\n", {}, "mine.py has no 'score'"),
        ("import nothing_of_this_name\n", {}, "mine.py line 1: ModuleNotFoundError"),
    ],
)
def test_what_the_driver_refuses_before_anything_starts(
    tmp_path: Path, code: str, more: dict[str, Any], said: str
) -> None:
    config = config_of(tmp_path, code, **more)
    with pytest.raises(UserError) as raised:
        make_text_rewards(config.rewards)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def score(responses):\n    return [1 / (len(text) - 2) for text in responses]\n",
            "raised ZeroDivisionError: division by zero (line 2), for prompt 'p0', sample 1",
        ),
        ("def score(responses): return [1.0, float('nan'), 2.0]\n", "returned nan for prompt 'p0', sample 1"),
        ("def score(responses): return [1.0, 'good', 2.0]\n", "returned 'good' for prompt 'p0', sample 1"),
        ("def score(responses): return [1.0]\n", "returned 1 scores for 3 responses; return a list of one each"),
        ("def score(responses): return 1.0\n", "returned 1.0 for 3 responses; return a list of one each"),
        ("def score(responses): return None\n", "returned None for 3 responses"),
    ],
)  # fmt: skip
def test_a_bad_result_names_function_prompt_and_sample(tmp_path: Path, code: str, said: str) -> None:
    rewards = rewards_of(config_of(tmp_path, code))
    with pytest.raises(UserError) as raised:
        rewards(trajectories())
    line = str(raised.value)
    assert line.startswith("reward 'mine' (") and said in line and "\n" not in line


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([], "key 'rewards': name one reward at least"),
        ([{"kind": "python", "name": "a", "path": "a.py:f", "weight": "x"}], "key 'rewards[0].weight': "),
        ([{"kind": "model"}, {"kind": "python", "nme": "a"}], "unknown key 'rewards[1].nme'; did you mean 'name'?"),
        ([{"kind": "model"}, {"kind": "model", "name": "again"}], "one reward of kind model at most"),
        ([{"kind": "model", "label": 0}], "label: only a model from elsewhere takes this; give its path"),
        ([{"kind": "model", "path": "a"}, {"kind": "model"}], "two rewards are named 'reward_model'"),
        ([{"kind": "python", "name": "a", "path": "a.py:f"}] * 2, "two rewards are named 'a'"),
        ([{"kind": "python", "name": "a", "path": "a.py"}], "'rewards[0].path'"),
        ([{"kind": "pyton", "name": "a", "path": "a.py:f"}], "key 'rewards[0].kind': 'pyton' is none of model, python"),
    ],
)
def test_bad_sections_are_one_line(rewards: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_config({"name": "run", "rewards": rewards}, "test")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_whole_numbers_where_others_are_wanted() -> None:
    """In lists of sections, in the member of a union that its own key names, and not in lists of texts."""
    tree = read_yaml_text(
        "{name: run, rewards: [{kind: python, name: a, path: 'a.py:f', weight: 2, settings: {x: 2}}], "
        "dpo: {loss: simpo, target_margin: 2}, sft: {optimizer: {betas: [9e-1, 0]}}, data: {stop_tokens: ['1']}}"
    )
    config = parse_config(tree, "test")
    (reward,) = config.rewards
    assert (
        isinstance(reward, PythonReward)
        and type(reward.weight) is float
        and reward.weight == 2
        and reward.settings == {"x": 2}
    )
    assert config.dpo == SimPOConfig(target_margin=2.0) and config.sft.optimizer.betas == (0.9, 0.0)
    assert config.data.stop_tokens == ("1",)


def test_without_a_reward_model_its_stages_and_its_prompts_are_others() -> None:
    own = {"kind": "python", "name": "mine", "path": "mine.py:score"}
    config = parse_config({"name": "run", "rewards": [own]}, "test")
    assert [stage.name for stage in stages_of(config)] == ["sft", "rl", "evaluate"]
    assert stages_from("rewards") == ("rl", "evaluate")
    records = [Prompt(f"p{i}", "text") for i in range(300)]
    with_model, without = (split_train(records, config.data, reward_model=trained) for trained in (True, False))
    assert with_model.reward_model and not without.reward_model
    assert without.sft == with_model.sft
    assert {p.id for p in without.rl} == {p.id for p in (*with_model.reward_model, *with_model.rl)}
