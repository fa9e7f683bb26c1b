"""The page and `collect` of a run in a store, on two machines that share nothing but the store."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.label import open_labels
from rayrlhf.errors import UserError
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Judgement
from rayrlhf.reports.raters import labels_of
from rayrlhf.rewards import people_labeller
from rayrlhf.rewards.labellers import Unranked, write_unranked
from rayrlhf.runs import labels
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.labels import Newest, share_labels
from rayrlhf.runs.sharing import share
from rayrlhf.runs.storage import Store
from tests.unit.test_people_labeller import ANSWERS, WAITING, labeller

RANKS = {"ann": (1, 2, 3), "bob": (1, 3, 2)}


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, RunFolder]:
    """The run on the machine of `collect`, which has written its answers, and on another one."""
    monkeypatch.setattr(labels, "COPY_S", 0.0)
    monkeypatch.setattr(people_labeller, "POLL_S", 0.0)
    found = []
    for name in ("head", "page"):
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / name))
        Store.open.cache_clear()
        found.append(RunFolder(f"file://{tmp_path}/store/run"))
    head, page = found
    assert head.path != page.path
    write_unranked(head.to_rank, [Unranked(p.id, p.text, ANSWERS, (1,), ((1,), (2,), (3,))) for p, _ in WAITING])
    head.upload(head.to_rank)
    return head, page


def judge(page: RunFolder, *names: str) -> None:
    """What the page's command does with what these people say, from its start to its end."""
    with open_labels(page) as database:
        assert database.recall("overlap") == 2, "as collect wants it"
        for name in names:
            database.add_labeller(name)
            for item in database.items():
                database.judge(Judgement(item.id, name, RANKS[name]), f"{name} {item.id}")


def test_collect_goes_on_with_what_people_say_elsewhere(
    machines: tuple[RunFolder, RunFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head, page = machines
    coming = iter(["ann", "bob"])
    # While collect waits, one after the other opens the page, judges and goes.
    # Not `time.sleep` itself, which threads of other tests may call.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: judge(page, next(coming)))
    monkeypatch.setattr(people_labeller, "time", clock)
    people = labeller(labellers=2)
    people.prepare(WAITING, head)
    assert next(coming, None) is None
    # The first answer beats both others twice, and the others beat each other once: 2 wins, and half a win each.
    assert people.rank(*WAITING[0]).scores == (2.0, 0.5, 0.5)
    assert people.facts()["labellers"] == 2
    assert "on a machine that reaches the store opens the page" in capsys.readouterr().out
    assert [judgement.labeller for judgement in labels_of(head)[1]] == ["ann"] * 3 + ["bob"] * 3
    with open_labels(page) as database:
        database.forget("bob")
    assert [judgement.labeller for judgement in labels_of(head)[1]] == ["ann"] * 3
    with pytest.raises(UserError, match="0 of 3 prompts are ranked"):
        labeller(labellers=2, wait_s=0).prepare(WAITING, head)


def test_a_page_on_the_same_machine_is_read_at_once(machines: tuple[RunFolder, RunFolder]) -> None:
    head, _ = machines
    with pytest.raises(UserError, match="0 of 3 prompts are ranked"):
        labeller(labellers=2, wait_s=0).prepare(WAITING, head)
    judge(head, "ann")
    with contextlib.closing(LabelDatabase(head.labels)) as database:  # newer than the copy in the store
        database.add_labeller("bob")
        for item in database.items():
            database.judge(Judgement(item.id, "bob", RANKS["bob"]), f"bob {item.id}")
    people = labeller(labellers=2, wait_s=0)
    people.prepare(WAITING, head)
    assert people.facts()["labellers"] == 2


def test_the_page_moves_to_another_machine(machines: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    head, page = machines
    with pytest.raises(UserError, match="0 of 3 prompts are ranked"):
        labeller(labellers=2, wait_s=0).prepare(WAITING, head)
    judge(page, "ann")
    with contextlib.closing(LabelDatabase(head.labels)) as waiting, contextlib.closing(Newest(head, waiting)) as newest:
        assert newest.changed() and newest.database is not waiting and not newest.changed()
        judge(head, "bob")  # where collect waits all the while
        assert newest.changed() and newest.database is waiting and not newest.changed()
        assert [judgement.labeller for judgement in waiting.judgements()] == ["ann"] * 3 + ["bob"] * 3
    # What the other machine says meanwhile would be lost.
    with contextlib.closing(LabelDatabase(page.labels)) as database:
        database.undo("ann")
    with pytest.raises(UserError, match=r"/page/.* has 1 judgements that a page on another .*/head/"):
        judge(page)


def test_a_run_that_takes_the_comparisons_over_has_the_judgements(
    machines: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    """Out of a store into a directory, and from a directory into a store."""
    head, page = machines
    with pytest.raises(UserError):
        labeller(labellers=2, wait_s=0).prepare(WAITING, head)
    judge(page, "ann")
    with head.writing("collect") as path:
        path.write_text("comparisons")
    other, third = RunFolder(tmp_path / "other"), RunFolder(f"file://{tmp_path}/store/third")
    share(head, other, ["collect"])
    share_labels(other, third)
    for run in (other, third):
        assert [judgement.labeller for judgement in labels_of(run)[1]] == ["ann"] * 3
    assert third.read(third.labels_copy) is not None
