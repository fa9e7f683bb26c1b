"""The labeller that waits for people: when it goes on, what it makes of their judgements, and the stage around it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jobs.collect
from jobs.collect import collect
from jobs.guard import guarded
from jobs.session import Session, opened
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.config_labellers import PeopleLabellerConfig
from rayrlhf.data.comparisons import read_ranked
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.labelling.wanted import Progress, Wanted, disagreement
from rayrlhf.rewards import people_labeller
from rayrlhf.rewards.labellers import Unranked, make_labeller
from rayrlhf.rewards.people_labeller import PeopleLabeller
from rayrlhf.runs.folder import RunFolder
from tests.unit.test_session import config

ANSWERS = ("it is a drink made of leaves", "it is a kind of car, no", "it is what it is, yes")
WAITING = [(Prompt(id, f"What is {id}?"), ANSWERS) for id in ("tea", "milk", "beer")]

WRITER = """
import sys, time
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Judgement

database = LabelDatabase(sys.argv[1])
while not database.items():
    time.sleep(0.01)
for name in sys.argv[2:-1]:
    database.add_labeller(name)
    for item in database.items():
        ranks = None if item.id == sys.argv[-1] else (1, 2, 2) if name == "ann" else (1, 2, 1)
        database.judge(Judgement(item.id, name, ranks, skipped="" if ranks else "unsure"), f"{name} {item.id}")
"""
"""Ann and bob agree that the car is worse than the leaves; and nothing is said of the prompt that is named last."""


def judge(path: Path, *judgements: Judgement) -> None:
    database = LabelDatabase(path)
    for number, judgement in enumerate(judgements):
        database.add_labeller(judgement.labeller)
        database.judge(judgement, f"{judgement} {number}")
    database.close()


def labeller(**settings: Any) -> PeopleLabeller:
    made = make_labeller(PeopleLabellerConfig(**settings))
    assert isinstance(made, PeopleLabeller)
    return made


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people_labeller, "POLL_S", 0.01)


def test_it_goes_on_when_another_process_has_written_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    people = labeller(labellers=2)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(run.labels), "ann", "bob", "beer"]) as writer:
        people.prepare(WAITING, run)
        assert writer.wait() == 0
    verdict = people.rank(*WAITING[0])
    # Leaves beat the car twice; leaves and "what it is" tie once and win once; "what it is" and the car: once, a tie.
    assert verdict.scores == (2.0, 0.0, 1.0) and verdict.order == (0, 2, 1)
    assert people.rank(*WAITING[2]).unknown
    out = capsys.readouterr().out
    assert out.startswith("collect: 0 of 3 prompts are ranked; `rayrlhf label ") and out.count("\n") == 1
    assert "have the judgements of 2 labeller(s)" in out


def test_what_there_is_already_is_enough_for_a_lower_share(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"0 of 3 prompts are ranked, and collect.labeller.wait_s = 0 s") as raised:
        labeller(wait_s=0).prepare(WAITING, run)
    assert "\n" not in str(raised.value) and f"rayrlhf label {tmp_path}" in str(raised.value)
    judge(run.labels, Judgement("tea", "ann", (2, 1, 1)), Judgement("milk", "ann", (1, 2, 3)))
    with pytest.raises(UserError, match="2 of 3 prompts are ranked"):
        labeller(wait_s=0).prepare(WAITING, run)
    enough = labeller(wait_s=0, until=0.6)
    enough.prepare(WAITING, run)
    assert [enough.rank(*each).unknown for each in WAITING] == [False, False, True]
    database = LabelDatabase(run.labels)
    assert database.recall("overlap") == 1 and [item.id for item in database.items()] == ["tea", "milk", "beer"]
    database.close()


def test_gold_ranks_that_somebody_set_stay(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    database = LabelDatabase(run.labels)
    database.add_items([Item("tea", "What is tea?", ANSWERS, gold=(1, 3, 2)), Item("other", "?", ANSWERS)])
    database.close()
    judge(run.labels, Judgement("tea", "ann", (1, 2, 3)), Judgement("other", "ann", (1, 2, 3)))
    people = labeller(wait_s=0)
    people.prepare(WAITING[:1], run)
    # The gold ranks order three pairs; ann has the last two the other way round. `other` is none of the run's.
    assert people.facts() == {
        "labellers": 1, "judgements": 1, "skipped": 0, "with_gold": pytest.approx(2 / 3, abs=1e-4),
        "lowest_reliability": 0.8,
    }  # fmt: skip


def test_other_answers_than_people_saw_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    database = LabelDatabase(run.labels)
    database.add_items([Item("tea", "What is tea?", ("others", "altogether"))])
    database.close()
    with pytest.raises(UserError, match="item 'tea' has other answers than before"):
        labeller().prepare(WAITING, run)


ITEMS = [Item(id, "?", ("x", "y", "z")) for id in "abcd"]
SAID = [
    Judgement("a", "ann", (1, 2, 3)),
    Judgement("a", "bob", (1, 2, 2)),  # agrees on all pairs that both order
    Judgement("b", "ann", (1, 2, 3)),
    Judgement("b", "bob", (3, 2, 1)),
    Judgement("c", "ann", (1, 2, 3)),
    Judgement("c", "ann", (3, 2, 1), repeat=1),
    Judgement("c", "bob", None, skipped="unsure"),
    Judgement("c", "cy", None, skipped="unsure"),
]


def test_how_many_judgements_are_enough() -> None:
    first = {item.id: [each for each in SAID if each.item == item.id and not each.repeat] for item in ITEMS}

    def complete(wanted: Wanted) -> str:
        return "".join(id for id, own in first.items() if wanted.complete(own))

    assert [complete(Wanted(count, 1.0)) for count in (1, 2, 3)] == ["abc", "abc", "c"]
    # a is settled, b is not; c has three, of whom two saw nothing to rank; nobody saw d.
    settling = Wanted(3, 0.5, settle=True)
    assert complete(settling) == "ac" and settling.enough(2, 4) and not settling.enough(1, 4)
    assert {id: settling.priority(own) for id, own in first.items()} == {"a": -1, "b": 1, "c": -1, "d": 0}
    assert disagreement(SAID[:2]) == 0
    assert disagreement([SAID[0], Judgement("a", "cy", (2, 1, 3))]) == pytest.approx(1 / 3)


def test_a_look_reads_what_is_new_and_agrees_with_all_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judgements, changes of mind, undoing and forgetting in a random order, against a reading of everything."""
    database = LabelDatabase(tmp_path / "labels.sqlite")
    database.add_items([*ITEMS, Item("other", "?", ("x", "y", "z"))])
    wanted = Wanted(3, 1.0, settle=True)
    progress = Progress(LabelDatabase(database.path), wanted, ITEMS)
    read: list[int] = []
    after = LabelDatabase.rows_after

    def counted(own: LabelDatabase, seq: int) -> Any:
        read.append(seq)
        return after(own, seq)

    monkeypatch.setattr(LabelDatabase, "rows_after", counted)
    draw = random.Random(0)
    for number in range(150):
        name = draw.choice(["ann", "bob", "cy"])
        database.add_labeller(name)
        if number % 40 == 39:
            database.forget(name)
        elif draw.random() < 0.2:
            database.undo(name)
        else:
            ranks = tuple(draw.choices((1, 2, 3), k=3)) if draw.random() < 0.8 else None
            repeat = int(draw.random() < 0.2)
            item = draw.choice(["a", "b", "c", "d", "other"])
            database.judge(Judgement(item, name, ranks, skipped="" if ranks else "?", repeat=repeat), str(number))
        if draw.random() < 0.7:
            continue  # several changes between two looks
        progress.look()
        expected = [judgement for judgement in database.judgements() if judgement.item != "other"]
        assert progress.judgements == expected
        first = {item.id: [j for j in expected if j.item == item.id and not j.repeat] for item in ITEMS}
        assert progress.done == sum(wanted.complete(own) for own in first.values())
        priorities = {item.id: item.priority for item in database.items() if item.id != "other"}
        assert priorities == {id: wanted.priority(own) for id, own in first.items()}
    assert read.count(0) == 4, "all is read at the first look, and after somebody was forgotten"
    assert len(read) > 20
    database.close()


def test_a_dispute_is_asked_first_and_an_agreement_no_more(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(UserError):
        labeller(labellers=3, choose="disagreement", wait_s=0).prepare(WAITING, run)
    said = {"tea": ((1, 2, 3), (1, 2, 3)), "milk": ((1, 2, 3), (2, 1, 3))}
    judge(run.labels, *(Judgement(id, f"labeller{i}", own[i]) for id, own in said.items() for i in range(2)))
    with pytest.raises(UserError, match="1 of 3 prompts are ranked"):
        labeller(labellers=3, choose="disagreement", wait_s=0).prepare(WAITING, run)
    database = LabelDatabase(run.labels)
    found = {item.id: item.priority for item in database.items()}
    database.close()
    assert found == {"tea": -1, "milk": pytest.approx(1 / 3), "beer": 0}


def test_settings_that_do_not_fit_are_one_line() -> None:
    for settings, said in (
        ({"choose": "disagreement", "labellers": 2}, "set labellers to 3 or more"),
        ({"until": 0.0}, "until"),
        ({"path": "x"}, "unknown key 'collect.labeller.path'"),
    ):
        with pytest.raises(UserError) as raised:
            parse_config({"name": "run", "collect": {"labeller": {"kind": "people", **settings}}}, "test")
        assert said in str(raised.value) and "\n" not in str(raised.value)


def test_as_many_answers_as_the_page_can_show() -> None:
    def collect(**settings: Any) -> None:
        parse_config({"name": "run", "collect": {"labeller": {"kind": "people"}, **settings}}, "test")

    collect(answers_per_prompt=9)
    for settings in ({"answers_per_prompt": 10}, {"answers_per_prompt": 9, "include_reference": True}):
        with pytest.raises(UserError, match="people rank 9 answers to a prompt at most, and there would be 10"):
            collect(**settings)


# ---- the stage


def with_people(directory: Path, **settings: Any) -> Config:
    found = config(directory)
    section = {"labeller": PeopleLabellerConfig(**settings), "heldout_fraction": 0.0}
    return found.model_copy(
        update={
            "data": found.data.model_copy(update={"comparisons": None, "reward_model_fraction": 0.3}),
            "collect": found.collect.model_copy(update=section),
        }
    )


def test_collect_waits_is_interrupted_and_learns_from_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = []

    def sample(session: Session, records: Any) -> Any:
        sampled.append(len(records))
        ids = tuple((i,) for i in range(3))
        return [Unranked(record.id, record.prompt, ANSWERS, (5,), ids) for record in records[:3]], {}

    def stage(**settings: Any) -> int:
        def run() -> None:
            with opened(with_people(tmp_path, **settings), local=True) as session:
                session.run.sft.mkdir(exist_ok=True)
                collect(session)

        return guarded(run)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.collect, "sample_answers", sample)
    with monkeypatch.context() as context:
        # Not `time.sleep` itself, which threads of other tests may call.
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=interrupt)
        context.setattr("rayrlhf.rewards.people_labeller.time", clock)
        assert stage() == 130
    assert "the same command continues" in capsys.readouterr().err
    run = RunFolder(tmp_path / "runs" / "run")
    assert not run.comparisons.exists() and run.to_rank.exists()

    waiting = run.to_rank.read_text()
    asked = [json.loads(line)["id"] for line in waiting.splitlines()]
    for key in ("id", "prompt"):  # the data has changed since
        rows = [json.loads(line) for line in waiting.splitlines()]
        rows[1][key] = "another"
        run.to_rank.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert stage() == 2
        error = capsys.readouterr().err
        assert f"1 of 3 prompts, first '{rows[1]['id']}', are not in the data any more" in error, error
    run.to_rank.write_text(waiting)
    judge(
        run.labels,
        Judgement(asked[0], "ann", (2, 1, 2), flags=("personal data",)),
        Judgement(asked[1], "ann", None, skipped="unsure"),
        Judgement(asked[2], "ann", (1, 2, 3)),
    )
    assert stage() == 0
    assert len(sampled) == 1, "people rank these answers: sampling again would give them others"
    ranked = read_ranked(run.comparisons)
    assert [(r.id, r.labeller) for r in ranked] == [(asked[0], "people"), (asked[2], "people")]
    assert ranked[0].responses == (ANSWERS[1], ANSWERS[0], ANSWERS[2]) and ranked[0].pairs == ((0, 1), (0, 2))
    assert ranked[1].responses == ANSWERS and len(ranked[1].pairs) == 3
    assert ranked[1].gold is not None and len(ranked[1].gold) == 3
    assert all(gold is not None and math.isfinite(gold) for gold in ranked[1].gold)
    out = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 prompts have no ranking and are left out" in out and "5 pairs" in out
    assert "labellers 1, judgements 2, skipped 1, flagged personal data 1" in out
    assert json.loads(run.labeller.read_text())["skipped"] == 1
