"""Who agrees with whom in a run's folder, by hand: people, judge, gold, reward model, and the longer answer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import rank_answers, write_comparisons
from rayrlhf.errors import UserError
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.reports.agreement import labellers_grid, raters_grid
from rayrlhf.reports.page import write_report
from rayrlhf.reports.raters import agreement_of, compare, people_of, raters_of
from rayrlhf.runs.folder import RunFolder, open_or_create

ANSWERS = ("a", "bb", "ccc")
"""The longer ones come later."""


def a_run(directory: Path, name: str, labeller: str, scores: dict[str, tuple[float, ...]], **more: Any) -> RunFolder:
    """A run whose labeller gave these scores to `ANSWERS`, by prompt."""
    section = {"kind": "reference"} if labeller == "reference" else {"kind": "people"}
    run = open_or_create(parse_config({"name": name, "collect": {"labeller": section}}, "test"), directory)
    ranked = [
        rank_answers(
            id=id, prompt="?", prompt_ids=(1,), responses=ANSWERS, response_ids=((1,), (2,), (3,)),
            order=sorted(range(3), key=lambda i: -own[i]), scores=own, labeller=labeller, **more,
        )
        for id, own in scores.items()
    ]  # fmt: skip
    write_comparisons(run.comparisons, ranked)
    return run


def table(run: RunFolder) -> dict[tuple[str, str], tuple[float | None, int, int, int]]:
    """By two raters: the share ordered alike, pairs, prompts, ties."""
    return {
        (each.one, each.other): (
            round(each.alike.mean, 4) if each.alike else None, each.pairs, each.alike.n if each.alike else 0, each.ties,
        )
        for each in agreement_of([run.address])
    }  # fmt: skip


def test_people_gold_reward_model_and_length_on_the_same_pairs(tmp_path: Path) -> None:
    # People: p a > bb > ccc; q ccc > a = bb. Gold says ccc > bb > a of both.
    run = a_run(
        tmp_path, "one", "people", {"p": (3.0, 2.0, 1.0), "q": (1.0, 1.0, 2.0)}, gold=(0.1, 0.2, 0.3)
    )  # fmt: skip
    # Of the held-out pairs of p, as sorted: the reward model has a over bb right, and bb over ccc wrong.
    pairs = [
        {"id": "p", "better": 0, "worse": 1, "reward_model": 0.5},
        {"id": "p", "better": 1, "worse": 2, "reward_model": -2.0},
        {"id": "elsewhere", "better": 0, "worse": 1, "reward_model": 1.0},
    ]
    pq.write_table(pa.Table.from_pylist(pairs), run.heldout_pairs)
    found = table(run)
    # p: people go against gold three times. q: with it on both pairs with ccc, and the third is a tie.
    assert found["gold", "people"] == (0.4, 5, 2, 1) == found["people", "longer answer"]
    assert found["gold", "longer answer"] == (1.0, 6, 2, 0)
    assert found["people", "reward model"] == (0.5, 2, 1, 0)
    assert found["gold", "reward model"] == (0.5, 2, 1, 0)


def test_answers_of_the_models_are_compared_by_gold_and_reward(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "one"}, "test"), tmp_path)
    rows = [
        {"id": "p", "reference": "x", "sft": "a", "policy": "bb", "gold_reference": 1.0, "gold_sft": 0.1,
         "gold_policy": 0.2, "reward_reference": 0.0, "reward_sft": 1.0, "reward_policy": 2.0},
        {"id": "q", "reference": "x", "sft": "a", "policy": "b", "gold_reference": 1.0, "gold_sft": 0.3,
         "gold_policy": 0.2, "reward_reference": 0.0, "reward_sft": 1.0, "reward_policy": 2.0},
        {"id": "r", "reference": "x", "sft": "a", "policy": "b", "gold_reference": 1.0, "gold_sft": None,
         "gold_policy": None, "reward_reference": 0.0, "reward_sft": 1.0, "reward_policy": 2.0},
        {"id": "s", "reference": "x", "sft": "a", "policy": "a", "gold_reference": 1.0, "gold_sft": 0.2,
         "gold_policy": 0.2, "reward_reference": 0.0, "reward_sft": 1.0, "reward_policy": 1.0},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), run.samples)
    found = table(run)
    assert found["gold", "reward model"] == (0.5, 2, 2, 0), "the reference is gold's own yardstick"
    assert found["reward model", "longer answer"] == (1.0, 1, 1, 2), "of p; b is no longer than a"


def test_the_labeller_that_measures_is_gold(tmp_path: Path) -> None:
    run = a_run(tmp_path, "one", "reference", {"p": (0.3, 0.2, float("nan"))})
    assert raters_of(run) == {"gold": {("p", "a", "bb"): 1.0}}


def test_people_one_by_one_beside_each_other(tmp_path: Path) -> None:
    run = a_run(tmp_path, "one", "people", {"p": (3.0, 2.0, 1.0)})
    database = LabelDatabase(run.labels)
    database.add_items([Item("p", "?", ANSWERS)])
    for name, ranks in (("ann", (1, 2, 3)), ("bob", (2, 1, 3))):
        database.add_labeller(name)
        database.judge(Judgement("p", name, ranks, seconds=20.0), name)
    database.close()
    found = table(run)
    assert found["people: ann", "people: bob"] == (round(2 / 3, 4), 3, 1, 0)
    assert found["people", "people: ann"] == (1.0, 3, 1, 0)
    figures = people_of(run)
    assert figures is not None and figures[0].everyone.with_others is not None
    console = Console(file=io.StringIO(), width=160)
    console.print(labellers_grid(*figures).rich(), raters_grid(agreement_of([run.address])).rich())
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "ann 1 0 0 0.00 0.67 [0.09, 0.97] 20 0.80" in shown
    assert "people: ann people: bob 0.667 [0.094, 0.975] 3 1 0" in shown
    printed = CliRunner().invoke(app, ["agreement", run.address], terminal_width=160)
    assert printed.exit_code == 0 and "people: ann" in printed.output and "with others" in printed.output
    nothing = CliRunner().invoke(app, ["agreement", str(tmp_path / "two")])
    assert nothing.exit_code == 2 and "no run folder" in nothing.output
    page = write_report(run).read_text()
    assert "<h2>Agreement</h2>" in page
    assert "<tr><th>people: ann</th><th>people: bob</th><td>0.667 [0.094, 0.975]</td><td>3</td>" in page


def test_a_judge_in_another_run_with_the_same_answers(tmp_path: Path) -> None:
    people = a_run(tmp_path, "one", "people", {"p": (3.0, 2.0, 1.0), "q": (1.0, 2.0, 3.0)})
    judge = a_run(tmp_path, "two", "judge", {"p": (0.5, 1.0, 0.0), "elsewhere": (1.0, 2.0, 3.0)})
    found = {(each.one, each.other): each for each in agreement_of([people.address, judge.address])}
    both = found["one: people", "two: judge"]
    assert both.alike is not None and both.alike.mean == pytest.approx(2 / 3) and both.pairs == 3


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As the first rounds of two runs are, and a run that is named twice is one."""
    one = a_run(tmp_path / "people", "round-1", "people", {"p": (3.0, 2.0, 1.0)})
    two = a_run(tmp_path / "judge", "round-1", "judge", {"p": (2.0, 3.0, 1.0)})
    found = agreement_of([one.address, two.address, one.address])
    assert [(each.one, each.other, each.pairs) for each in found if each.other != "longer answer"] == [
        (f"{one.address}: people", f"{two.address}: judge", 3)
    ]


def test_the_held_out_pairs_of_another_round_are_of_other_answers(tmp_path: Path) -> None:
    run = a_run(tmp_path, "round-2", "people", {"p": (3.0, 2.0, 1.0)})
    pairs = [
        {"id": "p", "better": 0, "worse": 1, "source": "round-2", "reward_model": 0.5},
        # The same prompt, once more in this round: the answers of the first round are not in this folder.
        {"id": "p", "better": 0, "worse": 1, "source": "round-1", "reward_model": -0.5},
        {"id": "p", "better": 1, "worse": 2, "source": "round-1", "reward_model": -0.5},
    ]
    pq.write_table(pa.Table.from_pylist(pairs), run.heldout_pairs)
    assert raters_of(run)["reward model"] == {("p", "a", "bb"): 1.0}
    for pair in pairs:  # without rounds, records have no source
        pair["source"] = ""
    pq.write_table(pa.Table.from_pylist(pairs[:1]), run.heldout_pairs)
    assert raters_of(run)["reward model"] == {("p", "a", "bb"): 1.0}


def test_intervals_draw_prompts() -> None:
    """Prompts of three pairs each stand or fall together: the interval is that of as many single pairs."""
    one = {(str(i), "a", "b" * (j + 1)): 1.0 for i in range(40) for j in range(3)}
    other = {pair: 1.0 if int(pair[0]) % 2 else -1.0 for pair in one}
    [found] = compare({"one": one, "other": other})
    alone = [{pair: verdict for pair, verdict in each.items() if pair[2] == "b"} for each in (one, other)]
    [single] = compare({"one": alone[0], "other": alone[1]})
    assert found.alike is not None and single.alike is not None
    assert (found.alike.low, found.alike.high) == pytest.approx((single.alike.low, single.alike.high))
    assert found.pairs == 120


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        agreement_of([tmp_path])
    run = a_run(tmp_path, "one", "reference", {"p": (3.0, 2.0, 1.0)})
    with pytest.raises(UserError, match=r"no two raters have a pair of answers in common in .*/one \(raters: gold\)"):
        agreement_of([run.address])
    run.comparisons.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"comparisons.parquet: is damaged"):
        agreement_of([run.address])
