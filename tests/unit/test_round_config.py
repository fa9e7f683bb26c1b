"""The config of each round, and what cannot be repeated in rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.session import opened
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, load_config, parse_config
from rayrlhf.errors import UserError
from rayrlhf.runs.changes import config_changes
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.rounds import round_config
from rayrlhf.runs.starts import Starts, find_models
from rayrlhf.sweeps.plan import load_sweep
from tests.rounds import RUN, config, write_model

ROOT = Path(__file__).parents[2]


def derived(own: Config, number: int) -> dict[str, Any]:
    """What a round has otherwise than the run: dotted key to value."""
    before, after = dump_config(own) | {"rounds": None}, dump_config(round_config(own, number, RUN))
    found = {}
    for change in config_changes(before, after):
        value: Any = after
        for part in change.key.split("."):
            value = value[part]
        found[change.key] = value
    return found


# ---- the config of a round


def test_the_first_round_is_the_run_without_rounds() -> None:
    assert derived(config(), 1) == {"name": "round-1", "runs_dir": RUN}
    assert derived(config(**{"from": "runs/other"}), 1) == {"name": "round-1", "runs_dir": RUN}


def test_the_third_round_by_default() -> None:
    assert derived(config(collect={"prompts": 10}, rl={"steps": 3, "prompts_per_step": 4}), 3) == {
        "name": "round-3",
        "runs_dir": RUN,
        "from": f"{RUN}/round-1",
        "collect.models": [{"from": f"{RUN}/round-2/policy", "share": 1.0}],
        "collect.skip_prompts": 20,
        "collect.earlier": [
            {"path": f"{RUN}/round-2/comparisons.parquet", "weight": 1.0},
            {"path": f"{RUN}/round-1/comparisons.parquet", "weight": 1.0},
        ],
        "rl.from": f"{RUN}/round-2/policy",
        "rl.reference_from": "sft",
        "rl.skip_prompts": 24,
        "evaluate.previous_from": f"{RUN}/round-2/policy",
    }


def models(own: Config, number: int) -> list[tuple[str, float]]:
    return [(each.start, each.share) for each in round_config(own, number, RUN).collect.models]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, [[], [("1/policy", 1.0)], [("2/policy", 1.0)], [("3/policy", 1.0)]]),
        (
            {"newest": 0.5, "earlier": 0.5},
            [[], [("1/policy", 1.0)], [("2/policy", 0.5), ("1/policy", 0.5)],
             [("3/policy", 0.5), ("2/policy", 0.25), ("1/policy", 0.25)]],
        ),
        (
            {"newest": 2.0, "earlier": 1.0, "sft": 1.0},
            [[], [("1/policy", 3.0), ("1/sft", 1.0)], [("2/policy", 2.0), ("1/policy", 1.0), ("1/sft", 1.0)],
             [("3/policy", 2.0), ("2/policy", 0.5), ("1/policy", 0.5), ("1/sft", 1.0)]],
        ),
    ],
)  # fmt: skip
def test_who_answers(answers: dict[str, float], expected: list[list[tuple[str, float]]]) -> None:
    own = config({"count": 4, "answers": answers})
    for number, wanted in enumerate(expected, 1):
        assert models(own, number) == [(f"{RUN}/round-{name}", share) for name, share in wanted]


@pytest.mark.parametrize(("age_weight", "weights"), [(1.0, [1.0, 1.0]), (0.5, [0.5, 0.25]), (0.0, [0.0, 0.0])])
def test_older_comparisons_weigh_less(age_weight: float, weights: list[float]) -> None:
    found = round_config(config({"age_weight": age_weight}), 3, RUN).collect.earlier
    assert [each.weight for each in found] == weights


def test_what_training_begins_with() -> None:
    anew = config({"policy_from": "sft", "reward_model_from": "previous"})
    found = derived(anew, 3)
    assert found["reward_model.from"] == f"{RUN}/round-2/reward_model"
    assert "rl.from" not in found and "rl.reference_from" not in found, "it begins with the reference, the SFT model"
    dpo = {"stages": ["sft", "collect", "dpo", "evaluate"]}
    found = derived(config(**dpo), 2)
    assert found["dpo.from"] == found["collect.models"][0]["from"] == f"{RUN}/round-1/dpo"
    assert found["dpo.reference_from"] == "sft" and "rl.from" not in found and "reward_model.from" not in found
    assert "dpo.reference_from" not in derived(config(**dpo, dpo={"loss": "simpo"}), 2)
    # Where rl follows dpo, rl begins with the round's own dpo, and its reference is no policy of any round.
    both = config(stages=["sft", "collect", "reward_model", "dpo", "rl", "evaluate"])
    assert derived(both, 1) == {"name": "round-1", "runs_dir": RUN, "rl.reference_from": "sft"}
    found = derived(both, 2)
    assert (found["dpo.from"], found["dpo.reference_from"]) == (f"{RUN}/round-1/policy", "sft")
    assert found["rl.reference_from"] == "sft" and "rl.from" not in found


def test_models_that_the_run_was_given_stay_the_reference() -> None:
    stages = ["collect", "reward_model", "rl", "evaluate"]
    starts = {"sft": {"from": "models/sft"}, "rl": {"from": "models/start"}}
    given = config({"answers": {"sft": 1.0}}, stages=stages, **starts)
    found = derived(given, 2)
    assert "from" not in found, "there is no stage sft that round 1 could hand on"
    assert models(given, 2) == [(f"{RUN}/round-1/policy", 1.0), ("models/sft", 1.0)]
    assert (found["rl.from"], found["rl.reference_from"]) == (f"{RUN}/round-1/policy", "models/start")


def test_people_rank_each_round_into_a_file_of_its_own() -> None:
    people = config(collect={"labeller": {"kind": "file", "path": "/me/ranked.jsonl"}})
    assert "collect.labeller.path" not in derived(people, 1)
    assert derived(people, 2)["collect.labeller.path"] == "/me/ranked-round-2.jsonl"


FUNCTION = [{"kind": "python", "name": "mine", "path": "mine.py:score"}]
PAIRS = {"comparisons": {"format": "tldr_comparisons", "path": "file.jsonl"}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": PAIRS}, "rounds: leave out data.comparisons"),
        ({"stages": ["reward_model", "rl", "evaluate"], "sft": {"from": "m"}}, "stages: reward_model needs collect"),
        ({"stages": ["sft", "collect", "reward_model"]}, "rounds: need the stage rl or dpo"),
        ({"rewards": FUNCTION}, "rounds: need the stage reward_model"),
        ({"stages": ["sft", "collect", "reward_model", "rl"]}, "rounds: need the stage evaluate to stop by"),
        ({"evaluate": {"prompts": "other.jsonl"}}, "rounds: leave out evaluate.prompts"),
        ({"collect": {"skip_prompts": 1}}, "collect.skip_prompts: leave it out; rounds sets it"),
        ({"evaluate": {"previous_from": "m"}}, "evaluate.previous_from: leave it out"),
        ({"rounds": {"count": 0}}, "'rounds.count'"),
        ({"rounds": {"count": 2, "answers": {"newest": 0.0}}}, "'rounds.answers.newest'"),
        ({"rounds": {"count": 2, "age_weight": 1.5}}, "'rounds.age_weight'"),
        ({"rounds": None, "rl": {"reference_from": "sft"}, "stages": ["rl"], "rewards": FUNCTION}, "no SFT model"),
        ({"rounds": None, "dpo": {"loss": "simpo", "reference_from": "m"}}, "loss simpo has no reference policy"),
        ({"rounds": None, "data": PAIRS, "collect": {"skip_prompts": 3}}, "does without the stage collect"),
        ({"collect": {"earlier": [{"path": "a"}, {"path": "a"}]}}, "a is named twice"),
    ],
)
def test_what_cannot_be_repeated_is_one_line(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_config({"name": "mine", "rounds": {"count": 3}, **sections}, "test")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_of_rounds_goes_through_yaml(tmp_path: Path) -> None:
    own = round_config(config({"answers": {"sft": 0.5}, "age_weight": 0.5}), 3, RUN)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dump_config(own)))
    assert load_config(tmp_path / "config.yaml") == own


def test_commands_that_do_no_rounds_say_so(tmp_path: Path) -> None:
    own = config(runs_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"rounds: `rayrlhf run` does them.*mine/round-1/config\.yaml"), opened(own):
        pass
    with pytest.raises(UserError, match="rounds is set; a trial is one run"):
        load_sweep(next((ROOT / "configs/sweeps").glob("*.yaml")), ["rounds={count: 2}"])


def test_the_reference_is_named_apart_from_the_start(tmp_path: Path) -> None:
    for name in ("start", "other"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name)
    start, other = str(tmp_path / "start"), str(tmp_path / "other")

    def reference(**rl: Any) -> str:
        own = parse_config({"name": "a", "rl": rl}, "test")
        return Starts(own, RunFolder(tmp_path / "a"), find_models(own)).reference("rl")

    assert reference() == f"{tmp_path}/a/sft"
    assert reference(**{"from": start}) == start
    assert reference(**{"from": start, "reference_from": "sft"}) == f"{tmp_path}/a/sft"
    assert reference(**{"from": start, "reference_from": other}) == other
