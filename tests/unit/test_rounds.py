"""A run in rounds: what each round's config is, what they hand on, when no further one begins, what is shown."""

from __future__ import annotations

import io
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import save_file
from typer.testing import CliRunner

from jobs.cli import app
from jobs.collect import chosen_prompts, draw_answers
from jobs.reward_model import collected_or_published
from jobs.rounds import run_rounds
from jobs.session import opened
from jobs.status import runs_table
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, load_config, parse_config
from rayrlhf.data.comparisons import rank_answers, write_comparisons
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, whose_turn
from rayrlhf.data.records import Demonstration
from rayrlhf.errors import UserError
from rayrlhf.reports import rounds as rounds_report
from rayrlhf.reports.compare import read_runs
from rayrlhf.reports.overview import read_overview
from rayrlhf.reports.round_measures import RoundResult, heldout_by_round, read_rounds, reason_to_stop
from rayrlhf.reports.rounds import accuracy_rows, rounds_figure, rows
from rayrlhf.runs.changes import config_changes
from rayrlhf.runs.folder import RunFolder, open_or_create, run_folders
from rayrlhf.runs.rounds import newest_round, round_config
from rayrlhf.runs.stages import stages_of
from rayrlhf.runs.starts import Starts, find_model, find_models
from rayrlhf.sweeps.plan import load_sweep

ROOT = Path(__file__).parents[2]
RUN = "/runs/mine"


def config(rounds: dict[str, Any] | None = None, /, **sections: Any) -> Config:
    return parse_config({"name": "mine", "rounds": {"count": 3, **(rounds or {})}, **sections}, "test")


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


# ---- what a round takes of the data


@pytest.mark.parametrize(
    ("shares", "turns"),
    [
        ([1.0], [0, 0, 0, 0, 0, 0, 0, 0]),
        ([1.0, 1.0], [0, 1, 0, 1, 0, 1, 0, 1]),
        ([2.0, 1.0, 1.0], [0, 1, 2, 0, 0, 1, 2, 0]),
        ([3.0, 1.0], [0, 0, 1, 0, 0, 0, 1, 0]),
    ],
)
def test_models_answer_in_turn(shares: list[float], turns: list[int]) -> None:
    assert whose_turn(shares, 8) == turns


def test_every_model_has_its_share_of_all_answers() -> None:
    shares = np.random.default_rng(0).random(5)
    turns = np.array(whose_turn(shares.tolist(), 1000))
    for count in (10, 100, 999):
        had = np.bincount(turns[:count], minlength=5)
        assert (np.abs(had - count * shares / shares.sum()) <= len(shares) - 1).all()


def test_rounds_ask_other_prompts_while_there_are_any() -> None:
    records = [Demonstration(str(i), f"prompt {i}", "response") for i in range(25)]

    def asked(skip: int) -> set[str]:
        own = parse_config({"name": "a", "seed": 3, "collect": {"prompts": 10, "skip_prompts": skip}}, "test")
        found = [record.id for record in chosen_prompts(own, records)]
        assert len(set(found)) == len(found) == 10
        return set(found)

    first, second, third = asked(0), asked(10), asked(20)
    assert not first & second and len((first | second) & third) == 5 and len(first | second | third) == 25
    assert third - (first | second) == {r.id for r in records} - first - second
    assert third & first and not third & second, "those that were asked longest ago come again"


def test_rounds_of_rl_go_on_where_the_one_before_ended() -> None:
    whole = [prompts_of_step(11, 5, step, 4) for step in range(6)]
    in_rounds = [prompts_of_step(11, 5, step, 4, skip=2 * 4 * n) for n in range(3) for step in range(2)]
    assert in_rounds == whole


class Rollouts:
    """Stands for generators: an answer is told by the model that drew it, its prompt, and the seed."""

    def __init__(self) -> None:
        self.model = ""

    def load_weights(self, model: str) -> int:
        self.model = model
        return 0

    def generate(self, prompts: list[Any], draw: Any, version: int, *seed: int | str) -> list[Any]:
        return [(self.model, prompt.id, seed) for prompt in prompts]


def test_the_answers_to_a_prompt_are_shared_out_to_the_models() -> None:
    """Each model draws at once, with a seed of its own, and each answer comes to its place."""

    collect = {"answers_per_prompt": 3, "models": [{"from": "m"}]}
    session: Any = SimpleNamespace(
        config=parse_config({"name": "a", "collect": collect}, "test"),
        rollouts=Rollouts(),
        starts=SimpleNamespace(answering=[("new", 1.0), ("old", 1.0)]),
        data=SimpleNamespace(prompts=lambda records: [EncodedPrompt(record.id, (1,)) for record in records]),
    )
    records = [Demonstration(name, name, "response") for name in "ab"]
    new, old = ("collect",), ("collect", 1)
    drawn: Any = draw_answers(session, records)
    assert drawn == [
        ("new", "a", new), ("old", "a", old), ("new", "a", new),
        ("old", "b", old), ("new", "b", new), ("old", "b", old),
    ]  # fmt: skip


def test_comparisons_of_all_rounds_are_learnt_from_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("round-1", "round-2", "round-3"):
        (tmp_path / name).mkdir()
        made = [
            rank_answers(id=f"{name}{i}", prompt="What?", prompt_ids=[2], responses=["a", "b"], response_ids=[[3], [4]],
                         order=[0, 1], scores=None, labeller="toy", heldout=i == 2)
            for i in range(3)
        ]  # fmt: skip
        write_comparisons(tmp_path / name / "comparisons.parquet", made)
    earlier = [{"path": str(tmp_path / f"round-{n}/comparisons.parquet"), "weight": w} for n, w in ((2, 0.5), (1, 0.0))]
    session: Any = SimpleNamespace(
        config=parse_config({"name": "round-3", "collect": {"earlier": earlier}}, "test"),
        run=RunFolder(tmp_path / "round-3"),
    )
    found: Any = collected_or_published(session, limit=3)
    assert [(c.id, c.source, c.weight, c.heldout) for c in found] == [
        ("round-30", "round-3", 1.0, False), ("round-31", "round-3", 1.0, False), ("round-20", "round-2", 0.5, False),
        ("round-32", "round-3", 1.0, True), ("round-22", "round-2", 1.0, True), ("round-12", "round-1", 1.0, True),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "round-2/comparisons.parquet: 2 prompts to learn from with weight 0.5, 1 held out\n" in out
    assert "round-1/comparisons.parquet: 0 prompts to learn from with weight 0, 1 held out; 2 are unused" in out


# ---- what becomes of the rounds


def interval(mean: float, half: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 50}


def evaluation(number: int, rate: float, gold: float, reward: float) -> dict[str, Any]:
    """evaluation.json of a round: win rate over the round before, and changes of gold and reward to it."""
    before = "sft" if number == 1 else "previous"
    policy = {"gold": interval(0.2 + 0.01 * number), "reward": interval(1.0), "kl": interval(2.0)}
    policy |= {f"gold_win_rate_vs_{before}": interval(rate), f"win_rate_vs_{before}": interval(0.9)}
    return {
        "sft": {"gold": interval(0.2)},
        "policy": {"gold_win_rate_vs_sft": interval(0.5 + 0.1 * number), **policy},
        "differences": {
            "policy_minus_sft": {},
            f"policy_minus_{before}": {"gold": interval(gold), "reward": interval(reward)},
        },
    }


def results(*rounds: tuple[float, float, float]) -> list[RoundResult]:
    return [RoundResult(n, evaluation(n, *each), {}) for n, each in enumerate(rounds, 1)]


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([(0.7, 0.1, 0.1)], None),
        ([(0.51, 0.1, 0.1)], None),
        ([(0.7, 0.1, 0.1), (0.51, 0.1, 0.1)], None),
        ([(0.51, 0.1, 0.1), (0.7, 0.1, 0.1), (0.49, 0.1, 0.1)], None),
        ([(0.7, 0.1, 0.1), (0.51, 0.1, 0.1), (0.49, 0.1, 0.1)], "in rounds 2 and 3 the interval"),
        ([(0.51, 0.1, 0.1), (0.49, 0.1, 0.1)], "in rounds 1 and 2 the interval"),
        ([(0.3, 0.1, 0.1), (0.3, 0.1, 0.1)], None),  # it gets worse, clearly: that is no win rate of chance
        ([(0.7, 0.1, 0.1), (0.7, -0.1, 0.1)], "gold fell by 0.100 in round 2 while the reward rose by 0.100"),
        ([(0.7, -0.1, 0.1)], "gold fell by 0.100 in round 1"),
        ([(0.7, -0.01, 0.1)], None),  # its interval includes 0
        ([(0.7, -0.1, 0.01)], None),
        ([(0.7, -0.1, -0.1)], None),
    ],
)
def test_when_no_further_round_begins(rounds: list[tuple[float, float, float]], said: str | None) -> None:
    found = reason_to_stop(results(*rounds))
    assert found is None if said is None else found is not None and found.startswith(said)


def test_without_gold_the_reward_decides_who_wins() -> None:
    bare = evaluation(2, 0.7, 0.1, 0.1)
    del bare["policy"]["gold_win_rate_vs_previous"], bare["differences"]["policy_minus_previous"]["gold"]
    result = RoundResult(2, bare, {})
    assert result.win_rate("previous") == interval(0.9) and reason_to_stop([result]) is None


def pairs(rows: list[tuple[int, str, float]]) -> pa.Table:
    return pa.Table.from_pylist([{"prompt": p, "source": s, "reward_model": m} for p, s, m in rows])


def test_accuracy_and_confidence_by_round_against_hand_computation() -> None:
    three = float(np.log(3))  # sigmoid is 3/4
    new = [(0, "round-2", three), (0, "round-2", -three), (1, "round-2", three)]
    found = heldout_by_round(pairs([*new, (2, "round-1", 0.0), (3, "other", 9.0)]), 2)
    assert sorted(found) == [1, 2]
    assert found[2].accuracy["mean"] == pytest.approx(2 / 3) and found[2].accuracy["n"] == 2
    assert found[2].confidence == pytest.approx(0.75)
    assert (found[1].accuracy["mean"], found[1].confidence) == (0.5, 0.5), "a tie counts half"
    # The first round's comparisons stand alone, and their source has no name.
    assert heldout_by_round(pairs([(0, "", 1.0), (1, "", 2.0)]), 1)[1].accuracy["mean"] == 1.0


class Killed(Exception):
    pass


def write_model(directory: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, directory / "model.safetensors")


def stages_that(log: list[str], rates: list[float], kill: str = "") -> Callable[[Config], None]:
    """Does the stages of a round that are not done, by their outputs alone, and is killed before one."""

    def run_once(own: Config) -> None:
        run = open_or_create(own, own.runs_dir)
        number = int(own.name.removeprefix("round-"))
        find_models(own)  # what it begins with is there
        for stage in stages_of(own):
            if run.done(stage.name):
                continue
            if f"{own.name} {stage.name}" == kill:
                raise Killed
            log.append(f"{own.name} {stage.name}")
            with run.writing(stage.name) as output:
                if output.is_dir():
                    write_model(output)
                elif stage.name == "evaluate":
                    output.write_text(json.dumps(evaluation(number, rates[number - 1], 0.1, 0.1)))
                else:
                    output.write_text(own.name)
            if stage.name == "reward_model":
                sources = [f"round-{n}" if number > 1 else "" for n in range(1, number + 1)]
                pq.write_table(pairs([(i, source, 1.0) for i, source in enumerate(sources)]), run.heldout_pairs)

    return run_once


EACH = ["sft", "collect", "reward_model", "rl", "evaluate"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their figure, which takes a second to draw."""
    monkeypatch.setattr(rounds_report, "rounds_figure", lambda results: None)


def test_a_killed_run_goes_on_in_its_round_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    own = config({"count": 2}, runs_dir=str(tmp_path))
    expected = [f"round-{n} {stage}" for n in (1, 2) for stage in EACH]
    log: list[str] = []
    for stage in expected[1:]:  # it is killed once before each stage
        with pytest.raises(Killed):
            run_rounds(own, stages_that(log, [0.7, 0.7], kill=stage))
    run = RunFolder(tmp_path / "mine")
    assert json.loads((run.path / "rounds.json").read_text()) == {"begun": 2, "stopped": None}
    run_rounds(own, stages_that(log, [0.7, 0.7]))
    assert log == expected
    run_rounds(own, stages_that(log, [0.7, 0.7]))
    assert log == expected, "finished rounds are not opened again"
    assert "2 of 2 done" in capsys.readouterr().out
    page = run.report.read_text()
    assert 'href="round-2/report.html"' in page and "0.700 [0.680, 0.720]" in page and "No further" not in page
    # One round more is one round more.
    run_rounds(config({"count": 3}, runs_dir=str(tmp_path)), stages_that(log, [0.7, 0.7, 0.7]))
    assert log[len(expected) :] == [f"round-3 {stage}" for stage in EACH]


def test_it_stops_by_itself_and_goes_on_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    log: list[str] = []
    rates = [0.7, 0.51, 0.51, 0.7]
    own = config({"count": 4}, runs_dir=str(tmp_path))
    for _ in range(2):
        run_rounds(own, stages_that(log, rates))
        out = " ".join(capsys.readouterr().out.split())
        assert len(log) == 3 * len(EACH)
        assert "no further round: in rounds 2 and 3 the interval of the win rate" in out and "3 of 4 done" in out
        shown = CliRunner().invoke(app, ["rounds", str(tmp_path / "mine")])
        assert shown.exit_code == 0 and "no further round: in rounds 2 and 3" in shown.output
        assert "No further round: in rounds 2 and 3" in (tmp_path / "mine/report.html").read_text()
    run_rounds(config({"count": 4, "stop": False}, runs_dir=str(tmp_path)), stages_that(log, rates))
    assert len(log) == 4 * len(EACH) and "no further round" not in capsys.readouterr().out


def test_a_finished_round_keeps_its_settings(tmp_path: Path, undrawn: None) -> None:
    log: list[str] = []
    with pytest.raises(Killed):
        run_rounds(config(runs_dir=str(tmp_path)), stages_that(log, [0.7] * 3, kill="round-3 rl"))
    for rounds, sections, said in (
        ({"age_weight": 0.5}, {}, "round-2/config.yaml: collect.earlier was"),
        ({}, {"rl": {"steps": 7}}, "round-1/config.yaml: rl.steps was 20 and is now 7"),
    ):
        with pytest.raises(UserError) as raised:
            run_rounds(config(rounds, runs_dir=str(tmp_path), **sections), stages_that(log, [0.7] * 3))
        assert said in str(raised.value) and "\n" not in str(raised.value)
    once = parse_config({"name": "mine", "runs_dir": str(tmp_path)}, "test")
    with pytest.raises(UserError, match="is a run in rounds; set rounds"), opened(once):
        pass


def test_a_run_in_rounds_stands_for_its_newest_round(tmp_path: Path, undrawn: None) -> None:
    log: list[str] = []
    with pytest.raises(Killed):
        run_rounds(config(runs_dir=str(tmp_path)), stages_that(log, [0.7] * 3, kill="round-2 evaluate"))
    run = RunFolder(tmp_path / "mine")
    assert newest_round(run).path == tmp_path / "mine/round-2"
    overview = read_overview(run.address)
    assert overview.name == "mine/round-2" and overview.current is not None and overview.current.name == "evaluate"
    console = Console(file=io.StringIO(), width=160)
    console.print(runs_table(run_folders(tmp_path), 0.0))
    assert isinstance(console.file, io.StringIO)
    assert [line.split()[1:8] for line in console.file.getvalue().splitlines() if "mine" in line] == [
        ["mine/round-2", "│", "not", "running", "│", "4", "of"]
    ]
    assert find_model(run.address, "rl", "rl.from") == str(tmp_path / "mine/round-2/policy")
    with pytest.raises(UserError, match=r"mine/round-2 is unfinished: it has no evaluation\.json"):
        read_runs([run.address])
    shown = CliRunner().invoke(app, ["rounds", str(tmp_path)])
    assert shown.exit_code == 2 and "no run in rounds" in shown.output + shown.stderr


def test_the_tables_and_the_figure(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(Killed):
        run_rounds(config(runs_dir=str(tmp_path)), stages_that(log, [0.7, 0.6], kill="round-3 rl"))
    found = read_rounds(RunFolder(tmp_path / "mine"))
    table = rows(found)
    assert table[0] == ["round", "gold", "reward", "KL to SFT", "length", "wins over the round before", "wins over SFT"]
    assert table[1][1:3] == ["0.210 [0.190, 0.230]", "1.000 [0.980, 1.020]"]
    assert [row[5] for row in table[1:]] == ["0.700 [0.680, 0.720]", "0.600 [0.580, 0.620]", "–"]
    assert table[2][6] == "0.700 [0.680, 0.720]"
    accuracy = accuracy_rows(found)
    assert accuracy[0][1:] == [f"comparisons of round {n}" for n in (1, 2, 3)]
    assert [[cell == "–" for cell in row[1:]] for row in accuracy[1:]] == [
        [False, True, True], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert accuracy[1][1] == "1.000 [1.000, 1.000], confident 0.731"
    figure = rounds_figure(found)
    assert figure is not None
    drawn = {axes.get_title(loc="left"): axes for axes in figure.axes}
    gold = drawn["Gold; round 0 is SFT"].containers[0].lines[0]  # type: ignore[attr-defined]
    assert list(gold.get_xdata()) == [0, 1, 2] and list(gold.get_ydata()) == pytest.approx([0.2, 0.21, 0.22])
    assert len(drawn["Win rates"].containers) == 2 and "KL to the SFT model" in drawn
    assert rounds_figure([RoundResult(1, None, {})]) is None
    page = (tmp_path / "mine/report.html").read_text()
    assert "data:image/svg+xml" in page and "<h2>Reward models</h2>" in page


# ---- the reference policy


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


# ---- whether they help


def test_the_measurement_compares_equal_work(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts/rounds_against_once.py"))
    (file, *changes), (same, *others) = (script[plan](3, tmp_path) for plan in ("once", "in_rounds"))
    once, rounds = load_config(file, changes), load_config(same, others)
    assert once.rounds is None and rounds.rounds is not None and not rounds.rounds.stop
    assert once.rl.steps == rounds.rounds.count * rounds.rl.steps == 30
    assert once.collect.prompts == rounds.rounds.count * rounds.collect.prompts == 639
    assert once.seed == rounds.seed == 3 and rounds.start == str(tmp_path / "once-3")
    first = round_config(rounds, 1, str(tmp_path))
    assert (first.model, first.data, first.sft) == (once.model, once.data, once.sft), "SFT is taken over"
    # Ids in another order are brought together.
    for seed, (before, after) in enumerate([([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])]):
        for name, ids, gold in (("once", "abc", before), ("rounds", "cba", after[::-1])):
            (tmp_path / f"{name}-{seed}").mkdir()
            table = pa.table({"id": list(ids), "gold_policy": gold})
            pq.write_table(table, tmp_path / f"{name}-{seed}" / "samples.parquet")
    lines = script["compare"](tmp_path, [0, 1])
    assert [line.split(" [")[0] for line in lines] == [
        "seed 0: +0.1000",
        "seed 1: +0.3000",
        "pooled over 2 seeds and their prompts: +0.2000",
        "over seeds (t): +0.2000",
    ]
