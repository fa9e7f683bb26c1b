"""The database of labels: what was said stays, whatever happens to the process; who gets which item, in which order."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.errors import UserError
from rayrlhf.labelling.assignment import REPEAT_AFTER, Assigner, Assignment, shown_order
from rayrlhf.labelling.database import LabelDatabase, spread
from rayrlhf.labelling.judgements import Item, Judgement

ROOT = Path(__file__).parents[2]
ITEMS = [Item(f"p{i}", f"prompt {i}", ("first", "second", "third")) for i in range(6)]


@pytest.fixture
def database(tmp_path: Path) -> LabelDatabase:
    made = LabelDatabase(tmp_path / "labels.sqlite")
    made.add_items(ITEMS)
    for name in ("ann", "bob", "cleo"):
        made.add_labeller(name)
    return made


def said(item: str, labeller: str = "ann", ranks: tuple[int, ...] | None = (1, 2, 2), repeat: int = 0) -> Judgement:
    return Judgement(
        item, labeller, ranks, skipped="" if ranks else "too long", shown=(2, 0, 1), seconds=3.5, at=9.0, repeat=repeat
    )


# ---- judgements


def test_judgements_come_back_as_they_were_given(database: LabelDatabase) -> None:
    given = Judgement("p1", "ann", (2, 1, 1), "", ("harmful:2",), (None, 7, 1), "a → b", (1, 0, 2), 12.25, 99.5, 0)
    database.judge(given, "one")
    database.judge(said("p2", ranks=None), "two")
    assert database.judgements() == [given, said("p2", ranks=None)]
    again = LabelDatabase(database.path)  # another process sees the same
    assert again.judgements() == database.judgements() and again.items() == ITEMS


def test_the_newest_counts_and_undo_takes_it_back(database: LabelDatabase) -> None:
    database.judge(said("p0"), "1")
    database.judge(said("p1"), "2")
    database.judge(said("p0", ranks=(3, 2, 1)), "3")
    assert [(j.item, j.ranks) for j in database.judgements()] == [("p1", (1, 2, 2)), ("p0", (3, 2, 1))]
    assert database.undo("ann") == said("p0", ranks=(3, 2, 1))  # all that was said of p0 is withdrawn
    assert [j.item for j in database.judgements()] == ["p1"]
    assert database.undo("ann") == said("p1")
    assert database.undo("ann") is None and database.judgements() == []
    database.judge(said("p0"), "4")
    assert database.judgements() == [said("p0")]
    assert database.written() == 6  # nothing was deleted


def test_a_judgement_that_is_sent_twice_is_kept_once(database: LabelDatabase) -> None:
    for ranks in ((1, 2, 3), (3, 2, 1)):
        database.judge(said("p0", ranks=ranks), "the same key")
    assert database.judgements() == [said("p0", ranks=(1, 2, 3))] and database.written() == 1


def test_rows_cannot_be_changed_or_deleted(database: LabelDatabase) -> None:
    database.judge(said("p0"), "1")
    for sql in ("UPDATE judgements SET item = 'p1'", "DELETE FROM judgements"):
        with pytest.raises(sqlite3.IntegrityError, match="only added"), database.writing() as connection:
            connection.execute(sql)
    assert database.judgements() == [said("p0")]


def test_forgetting_removes_one_person_from_the_bytes_of_the_file(database: LabelDatabase) -> None:
    database.judge(Judgement("p0", "ann", (1, 2, 3), note="the-words-of-ann"), "1")
    database.judge(Judgement("p0", "bob", (1, 2, 3), note="the-words-of-bob"), "2")
    assert database.forget("ann") == 1
    assert list(database.labellers()) == ["bob", "cleo"] and [j.labeller for j in database.judgements()] == ["bob"]
    bytes = b"".join(path.read_bytes() for path in database.path.parent.iterdir())
    assert b"the-words-of-bob" in bytes and b"the-words-of-ann" not in bytes
    with pytest.raises(UserError, match="no labeller 'ann'; there are: bob, cleo"):
        database.forget("ann")


def test_items_may_change_their_priority_but_not_their_answers(database: LabelDatabase) -> None:
    database.add_items([Item("p0", "prompt 0", ("first", "second", "third"), priority=2.0, gold=(1, 2, 3))])
    assert database.items()[0] == Item("p0", "prompt 0", ("first", "second", "third"), 2.0, (1, 2, 3))
    assert database.items()[1:] == ITEMS[1:]
    with pytest.raises(UserError, match="'p1' has other answers than before"):
        database.add_items([Item("p1", "prompt 1", ("first", "third", "second"))])


def test_gold_ranks_that_come_in_meanwhile_stay(database: LabelDatabase) -> None:
    """A run that waits looks at the items, and before it has sorted them the page makes one of them a gold item."""
    seen = database.items()
    other = LabelDatabase(database.path)
    other.add_items([replace(ITEMS[2], gold=(1, 2, 3))])
    database.prioritize({item.id: 0.5 for item in seen[1:3]})
    assert [(item.priority, item.gold) for item in other.items()[:4]] == [
        (0.0, None), (0.5, None), (0.5, (1, 2, 3)), (0.0, None),
    ]  # fmt: skip


def test_bytes_that_another_process_holds_are_said(database: LabelDatabase) -> None:
    database.judge(said("p0"), "1")
    other = LabelDatabase(database.path)
    other.query("BEGIN")
    other.query("SELECT * FROM judgements")
    database.query("PRAGMA busy_timeout=1")
    with pytest.raises(UserError, match="1 rows of 'ann' are deleted, but another process reads the file"):
        database.forget("ann")
    assert database.judgements() == [] and "ann" not in database.labellers()


def test_progress_counts_people_not_rows(database: LabelDatabase) -> None:
    for key, judgement in enumerate(
        [said("p0"), said("p0", repeat=1), said("p0", ranks=(2, 1, 1)), said("p0", "bob"), said("p1", ranks=None)]
    ):
        database.judge(judgement, str(key))
    assert database.progress() == {"p0": 2, "p1": 1, "p2": 0, "p3": 0, "p4": 0, "p5": 0}
    assert spread(database.progress()) == {0: 4, 1: 1, 2: 1}


def test_a_copy_is_whole_while_others_write(database: LabelDatabase, tmp_path: Path) -> None:
    database.judge(said("p0"), "1")
    database.copy_to(tmp_path / "copy.sqlite")
    database.judge(said("p1"), "2")
    assert (tmp_path / "copy.sqlite").stat().st_mode & 0o777 == 0o600  # as private as the database
    assert LabelDatabase(tmp_path / "copy.sqlite").judgements() == [said("p0")]


def test_a_full_disk_keeps_nothing_of_a_judgement_and_what_follows_is_kept(database: LabelDatabase) -> None:
    database.judge(said("p0"), "1")
    database.query(f"PRAGMA max_page_count={database.query('PRAGMA page_count')[0][0]}")
    long = Judgement("p1", "ann", (1, 2, 3), note="x" * 100_000)
    with pytest.raises(UserError, match=r"cannot be written \(database or disk is full\); nothing of this was kept"):
        database.judge(long, "2")
    assert database.judgements() == [said("p0")]
    database.query("PRAGMA max_page_count=100000")
    database.judge(long, "2")
    assert database.judgements() == [said("p0"), long]


@pytest.mark.parametrize(
    "content", [b"no database at all, but some text that is long enough", b"SQLite format 3\0 cut"]
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.sqlite").write_bytes(content)
    with pytest.raises(UserError, match=r"labels\.sqlite: cannot be used as the database of labels"):
        LabelDatabase(tmp_path / "labels.sqlite")


def test_a_file_of_another_version_is_refused(database: LabelDatabase) -> None:
    with database.writing() as connection:
        connection.execute("PRAGMA user_version=7")
    with pytest.raises(UserError, match=r"another version \(tables 7, here 1\)"):
        LabelDatabase(database.path)


def test_a_file_that_is_moved_away_is_not_written_on(database: LabelDatabase, tmp_path: Path) -> None:
    """As somebody does who begins anew, beside a page and a run that have the file open."""
    database.judge(said("p0"), "1")
    database.path.rename(tmp_path / "old.sqlite")
    for _ in range(2):  # nothing is there, and then another file
        with pytest.raises(UserError, match=r"labels\.sqlite: was moved away or replaced .* the same command again"):
            database.judge(said("p1"), "2")
        with pytest.raises(UserError, match="was moved away"):
            database.query("PRAGMA data_version")  # what a run that waits looks at
        LabelDatabase(database.path).add_items(ITEMS)
    assert LabelDatabase(database.path).judgements() == []


# ---- a process that is killed

WRITERS = """
import os, random, signal, sys
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Judgement

def write(writer, pipe):
    database = LabelDatabase(sys.argv[1])
    for number in range(1_000_000):
        key = f"{writer} {number}"
        database.judge(Judgement("p0", "ann", (1, 2, 3), note=key), key)
        os.write(pipe, f"{key}\\n".encode())  # what the page does when it says: saved

chance = random.Random(0)
for writer in range(100):
    heard, told = os.pipe()
    child = os.fork()  # a hundred starts of Python would take ten seconds
    if not child:
        write(writer, told)
    os.close(told)
    with os.fdopen(heard) as lines:
        for _ in range(chance.randint(1, 8)):
            print(lines.readline(), end="")
        os.kill(child, signal.SIGKILL)
        print(lines.read(), end="")  # what it said before it died
    os.waitpid(child, 0)
"""


def test_a_kill_at_any_moment_loses_no_judgement_that_was_acknowledged(database: LabelDatabase) -> None:
    """100 writers, each killed (SIGKILL) behind its n-th word, which is some moment of the next writes."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", WRITERS, str(database.path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    acknowledged = done.stdout.splitlines()
    assert {line.split()[0] for line in acknowledged} == {str(writer) for writer in range(100)}
    assert database.query("PRAGMA integrity_check")[0][0] == "ok"
    kept = {row["key"] for row in database.query("SELECT key FROM judgements")}
    assert len(acknowledged) == len(set(acknowledged)) and set(acknowledged) <= kept
    assert database.judgements()[0].note in kept  # and it goes on


# ---- who gets what


def walk(assigner: Assigner, labellers: list[str], seed: int = 0) -> list[tuple[str, Assignment]]:
    """Labellers who come at random times, and judge what they get, until nothing is left for anybody."""
    chance, done, finished = random.Random(seed), [], set[str]()
    while len(finished) < len(labellers):
        name = chance.choice([each for each in labellers if each not in finished])
        task = assigner.next(name)
        if task is None:
            finished.add(name)
            continue
        done.append((name, task))
        assigner.database.judge(said(task.item, name, repeat=task.repeat), str(len(done)))
    return done


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_every_item_has_as_many_labellers_as_wanted(database: LabelDatabase, overlap: int) -> None:
    done = walk(Assigner(database, overlap=overlap, repeats=0.0), ["ann", "bob", "cleo"])
    assert len({(name, task.item) for name, task in done}) == len(done)
    assert set(database.progress().values()) == {overlap}


def test_two_people_are_not_given_the_last_place_of_an_item(database: LabelDatabase) -> None:
    now = [100.0]
    assigner = Assigner(database, lease_s=60.0, repeats=0.0, clock=lambda: now[0])
    first, second = assigner.next("ann"), assigner.next("bob")
    assert first and second and first != second
    assert assigner.next("ann") == first  # the same again, as after a reload
    now[0] = 100.0 + 59
    assert assigner.next("cleo") not in (None, first, second)
    now[0] = 100.0 + 119  # ann's lease began at 100 and was renewed by her second look at 100
    database.add_labeller("dora")
    assert assigner.next("dora") == first
    database.judge(said(first.item, "ann"), "late")  # and still hers counts
    now[0] = -10_000.0  # the clock was an hour ahead, and is set back: nobody waits that long
    database.add_labeller("eve")
    assert assigner.next("eve") == second
    assert database.judgements() == [said(first.item, "ann")]


def test_a_withdrawn_item_is_lent_to_who_withdrew_it(database: LabelDatabase) -> None:
    assigner = Assigner(database, repeats=0.0)
    task = assigner.next("ann")
    assert task
    database.judge(said(task.item), "1")
    database.undo("ann", lease_s=60.0)
    assert assigner.next("bob") != task and assigner.next("ann") == task


def test_higher_priority_comes_first_and_begun_items_are_finished_first(database: LabelDatabase) -> None:
    database.add_items([Item("p4", "prompt 4", ("first", "second", "third"), priority=1.0)])
    assigner = Assigner(database, overlap=2, repeats=0.0)
    assert assigner.next("ann") == Assignment("p4")
    database.judge(said("p4", "ann"), "1")
    assert assigner.next("ann") == Assignment("p0")
    database.judge(said("p3", "cleo"), "2")
    assert assigner.next("bob") == Assignment("p4")
    database.judge(said("p4", "bob"), "3")
    assert assigner.next("bob") == Assignment("p0")  # begun by ann, as p3 is by cleo


def test_gold_items_are_asked_of_everybody(database: LabelDatabase) -> None:
    database.add_items([Item(f"p{i}", f"prompt {i}", ("first", "second", "third"), gold=(1, 2, 3)) for i in (1, 5)])
    done = walk(Assigner(database, repeats=0.0), ["ann", "bob", "cleo"])
    assert database.progress() == {"p0": 1, "p1": 3, "p2": 1, "p3": 1, "p4": 1, "p5": 3} and len(done) == 10


def test_gold_items_and_repeats_have_their_share(tmp_path: Path) -> None:
    database = LabelDatabase(tmp_path / "many.sqlite")
    gold = dict.fromkeys(range(0, 300, 2), (1, 2))
    database.add_items([Item(f"p{i:03d}", "prompt", ("one", "two"), gold=gold.get(i)) for i in range(300)])
    database.add_labeller("ann")
    assigner = Assigner(database, repeats=0.1, gold=0.2)
    tasks = []
    for number in range(150):
        task = assigner.next("ann")
        assert task
        tasks.append(task)
        database.judge(said(task.item, ranks=(1, 2), repeat=task.repeat), str(number))
    first = [task.item for task in tasks if not task.repeat]
    again = [task.item for task in tasks if task.repeat]
    assert len(first) == len(set(first)) and len(again) == len(set(again)) and set(again) <= set(first)
    for task in tasks:
        if task.repeat:
            assert tasks.index(task) - tasks.index(Assignment(task.item)) > REPEAT_AFTER
    # Binomial with n = 150: 15 and 30 are expected, with standard deviations of 3.7 and 4.9.
    assert abs(len(again) - 15) < 4 * 3.7
    assert abs(sum(int(item[1:]) % 2 == 0 for item in first) - 30) < 4 * 4.9


def test_the_order_of_answers_is_that_of_labeller_item_run_and_time() -> None:
    base = shown_order("run/0", "ann", "p0", 0, 5)
    assert sorted(base) == [0, 1, 2, 3, 4] and base == shown_order("run/0", "ann", "p0", 0, 5)
    others = [shown_order(order, name, "p0", repeat, 5) for order, name, repeat in
              [("run/1", "ann", 0), ("other/0", "ann", 0), ("run/0", "bob", 0), ("run/0", "ann", 1)]]  # fmt: skip
    assert all(other != base for other in others)
    # Each of the 6 orders of three answers comes as often as the others: 600 draws, expected 100, sd 9.1.
    counts = Counter(shown_order("run/0", "ann", f"p{i}", 0, 3) for i in range(600))
    assert len(counts) == 6 and max(abs(count - 100) for count in counts.values()) < 46
