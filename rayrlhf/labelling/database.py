"""The database of a run's labels: one SQLite file that the page writes and the stage `collect` reads.

Judgements are only ever added. A change of mind is a new row, and so is an undo; the newest row of a labeller, an item
and a repeat counts. A row is on the disk before the page says that it is saved (`synchronous=FULL` in WAL mode), so
ending the process at any moment loses no judgement that was acknowledged. Several processes may have the file open.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.files import make_private
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.wording import shown

VERSION = 1
"""Of the tables, in the file's `user_version`."""
BUSY_S = 30.0
"""How long a writer waits for another one."""

_TABLES = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    prompt TEXT NOT NULL,
    answers TEXT NOT NULL,
    priority REAL NOT NULL,
    gold TEXT
);
CREATE TABLE labellers (name TEXT PRIMARY KEY, role TEXT NOT NULL);
CREATE TABLE leases (
    labeller TEXT PRIMARY KEY REFERENCES labellers (name) ON DELETE CASCADE,
    item TEXT NOT NULL REFERENCES items (id),
    repeat INTEGER NOT NULL,
    until REAL NOT NULL
);
CREATE TABLE judgements (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    item TEXT NOT NULL REFERENCES items (id),
    labeller TEXT NOT NULL REFERENCES labellers (name),
    repeat INTEGER NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0,
    judgement TEXT NOT NULL
);
CREATE INDEX newest ON judgements (item, labeller, repeat, seq);
CREATE INDEX own ON judgements (labeller, seq);
CREATE TABLE forgetting (labeller TEXT PRIMARY KEY);
CREATE TRIGGER judgements_do_not_change BEFORE UPDATE ON judgements
BEGIN SELECT RAISE(ABORT, 'judgements are only added'); END;
CREATE TRIGGER judgements_stay BEFORE DELETE ON judgements
WHEN NOT EXISTS (SELECT 1 FROM forgetting WHERE labeller = OLD.labeller)
BEGIN SELECT RAISE(ABORT, 'judgements are only added'); END;
CREATE VIEW current AS SELECT * FROM judgements AS mine WHERE undone = 0 AND seq = (
    SELECT max(seq) FROM judgements
    WHERE item = mine.item AND labeller = mine.labeller AND repeat = mine.repeat
);
"""


class LabelDatabase:
    """Items, labellers and judgements of one run.

    An object may be shared by threads.

    Raises:
        UserError: the file is no such database, or its file system has no locks for it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._turn = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            make_private(self.path)  # what people said is not for everybody; SQLite gives its side files the same mode
            # Transactions are written out below, so the module must not begin any (isolation_level).
            self._connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            mode = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            self._connection.executescript("PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON; PRAGMA secure_delete=ON;")
            self._file = self.path.stat().st_ino
            with self.writing() as connection:
                found = connection.execute("PRAGMA user_version").fetchone()[0]
                if found == 0:
                    for statement in _statements(_TABLES):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={VERSION}")
                if found in (0, VERSION):
                    identity = json.dumps(secrets.token_hex(8))
                    connection.execute("INSERT OR IGNORE INTO settings VALUES ('identity', ?)", (identity,))
        except (sqlite3.Error, OSError, UserError) as error:
            with contextlib.suppress(AttributeError):  # it may not even have been opened
                self._connection.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path}: cannot be used as the database of labels ({error}); it has to be a file that rayrlhf "
                "wrote, on a disk of this machine"
            ) from None
        if mode != "wal":
            raise UserError(f"{self.path}: its file system cannot share a database; put the run on a local disk")
        if found not in (0, VERSION):
            raise UserError(f"{self.path}: written by another version (tables {found}, here {VERSION}); move it away")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is on the disk when the block ends, and undone where the block raises.

        Raises:
            UserError: the disk is full, another process has kept the file for long, or it is not the file that was
                opened; nothing was changed.
        """
        with self._turn:
            self._check_place()
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:  # a full disk has ended it
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.IntegrityError):
                    raise UserError(f"{self.path}: cannot be written ({error}); nothing of this was kept") from error
                raise

    def query(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a question.

        Raises:
            UserError: it is not the file that was opened, or it is damaged.
        """
        with self._turn, self._sound():
            self._check_place()
            return self._connection.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """A block that reads rows and what they hold."""
        try:
            yield
        except (sqlite3.DatabaseError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{self.path}: the labels cannot be read ({shown(str(error))}); put a copy in their place, or move "
                "the file away to begin anew"
            ) from None

    def _check_place(self) -> None:
        """Whoever goes on with a file that was moved away writes, or waits, where nobody looks."""
        try:
            same = self.path.stat().st_ino == self._file
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(
                f"{self.path}: was moved away or replaced while this command had it open; call the same command again"
            )

    def close(self) -> None:
        """Close the file. Where no other process has it open, its side files go, too."""
        with self._turn:
            self._connection.close()

    # --- Settings ----------------------------------------------------------------------------------------------------

    def remember(self, key: str, value: Any) -> None:
        """Keep a JSON value beside the judgements."""
        with self.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, json.dumps(value)))

    def recall(self, key: str, default: Any = None) -> Any:
        """What `remember` kept."""
        rows = self.query("SELECT value FROM settings WHERE key = ?", key)
        with self._sound():
            return json.loads(rows[0]["value"]) if rows else default

    @property
    def identity(self) -> str:
        """What tells these labels from others with the same ids, such as those of the answers that a run had before."""
        return str(self.recall("identity"))

    # --- Items -------------------------------------------------------------------------------------------------------

    def add_items(self, items: Sequence[Item]) -> None:
        """Add items. Of one that is there already, only the priority and the gold ranks may differ; they are replaced.

        Raises:
            UserError: the database has other answers under the same id.
        """
        with self.writing() as connection:
            for item in items:
                known = connection.execute("SELECT prompt, answers FROM items WHERE id = ?", (item.id,)).fetchone()
                answers = json.dumps(item.answers)
                if known and (known["prompt"], known["answers"]) != (item.prompt, answers):
                    raise UserError(
                        f"{self.path}: item {item.id!r} has other answers than before, so its judgements do not fit; "
                        f"move {self.path.name} away to begin anew"
                    )
                connection.execute(
                    "INSERT INTO items (id, prompt, answers, priority, gold) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET priority = excluded.priority, gold = excluded.gold",
                    (item.id, item.prompt, answers, item.priority, item.gold and json.dumps(item.gold)),
                )

    def prioritize(self, priorities: Mapping[str, float]) -> None:
        """Set the priorities of these items."""
        with self.writing() as connection:
            connection.executemany("UPDATE items SET priority = ?2 WHERE id = ?1", priorities.items())

    def items(self) -> list[Item]:
        """All items, in the order in which they were added."""
        with self._sound():
            return [_item(row) for row in self.query("SELECT * FROM items ORDER BY position")]

    def item(self, id: str) -> Item | None:
        """The item of that id."""
        rows = self.query("SELECT * FROM items WHERE id = ?", id)
        with self._sound():
            return _item(rows[0]) if rows else None

    def progress(self) -> dict[str, int]:
        """By item: how many labellers are done with it. One who skipped it is done, too."""
        rows = self.query(
            "SELECT items.id, count(current.seq) AS done FROM items "
            "LEFT JOIN current ON current.item = items.id AND current.repeat = 0 GROUP BY items.id ORDER BY position"
        )
        return {row["id"]: row["done"] for row in rows}

    # --- Labellers ---------------------------------------------------------------------------------------------------

    def add_labeller(self, name: str, role: str = "labeller") -> None:
        """Let somebody judge; of somebody known, nothing changes but the role."""
        with self.writing() as connection:
            connection.execute(
                "INSERT INTO labellers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET role = excluded.role",
                (name, role),
            )

    def labellers(self) -> dict[str, str]:
        """Roles by name."""
        return {row["name"]: row["role"] for row in self.query("SELECT * FROM labellers ORDER BY rowid")}

    def forget(self, labeller: str) -> int:
        """Delete somebody's judgements, lease and name, and overwrite them in the file. Returns how many rows went.

        Raises:
            UserError: nobody of that name is known; or another process has kept reading the file, which then has the
                bytes until that one ends.
        """
        if labeller not in self.labellers():
            known = ", ".join(self.labellers()) or "none"
            raise UserError(f"{self.path}: no labeller {labeller!r}; there are: {known}")
        with self.writing() as connection:
            connection.execute("INSERT INTO forgetting VALUES (?)", (labeller,))
            gone = connection.execute("DELETE FROM judgements WHERE labeller = ?", (labeller,)).rowcount
            connection.execute("DELETE FROM labellers WHERE name = ?", (labeller,))
            connection.execute("DELETE FROM forgetting")
        with self._turn:  # the log still holds the old pages
            self._connection.execute("VACUUM")
            busy = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise UserError(
                f"{self.path}: {gone} rows of {labeller!r} are deleted, but another process reads the file, so that "
                "their bytes are still in it; end that process, and open and close the page once"
            )
        return gone

    # --- Judgements --------------------------------------------------------------------------------------------------

    def judge(self, judgement: Judgement, key: str) -> None:
        """Add a judgement, and end the labeller's lease on the item. It is on the disk when this returns.

        Args:
            key: unique for each judgement. One that comes a second time, because its sender heard no answer, is kept
                once.
        """
        values = {name: value for name, value in vars(judgement).items() if name not in ("item", "labeller", "repeat")}
        place = (judgement.item, judgement.labeller, judgement.repeat)
        with self.writing() as connection:
            connection.execute(
                "INSERT INTO judgements (key, item, labeller, repeat, judgement) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO NOTHING",
                (key, *place, json.dumps(values, ensure_ascii=False)),
            )
            connection.execute("DELETE FROM leases WHERE item = ? AND labeller = ? AND repeat = ?", place)

    def undo(self, labeller: str, lease_s: float = 0.0) -> Judgement | None:
        """Withdraw a labeller's newest judgement, and lend out its item to them again. Returns it, if there is one."""
        with self.writing() as connection:
            row = connection.execute(
                "SELECT * FROM current WHERE labeller = ? ORDER BY seq DESC LIMIT 1", (labeller,)
            ).fetchone()
            if row is None:
                return None
            connection.execute(
                "INSERT INTO judgements (key, item, labeller, repeat, undone, judgement) VALUES (?, ?, ?, ?, 1, ?)",
                (f"undo {row['key']}", row["item"], labeller, row["repeat"], row["judgement"]),
            )
            connection.execute(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)",
                (labeller, row["item"], row["repeat"], time.time() + lease_s),
            )
        return _judgement(row)

    def judgements(self, labeller: str | None = None) -> list[Judgement]:
        """The newest of each labeller, item and repeat, without those that were undone; in the order of writing."""
        rows = self.query("SELECT * FROM current WHERE ?1 IS NULL OR labeller = ?1 ORDER BY seq", labeller)
        with self._sound():
            return [_judgement(row) for row in rows]

    def newest(self, item: str, labeller: str, repeat: int) -> Judgement | None:
        """What somebody said of an item, the last time."""
        rows = self.query(
            "SELECT * FROM current WHERE item = ? AND labeller = ? AND repeat = ?", item, labeller, repeat
        )
        with self._sound():
            return _judgement(rows[0]) if rows else None

    def written(self, until: int | None = None) -> int:
        """How many rows of judgements there are, up to the number `until`. Each judgement and each undo is one."""
        return int(self.query("SELECT count(*) FROM judgements WHERE ?1 IS NULL OR seq <= ?1", until)[0][0])

    def version(self) -> int:
        """A number that changes when another connection writes, also if it deletes. To read it costs little."""
        return int(self.query("PRAGMA data_version")[0][0])

    def rows_after(self, seq: int) -> Iterator[tuple[int, bool, Judgement]]:
        """The rows behind that number, in the order of writing: number, whether it is an undo, and the judgement."""
        for row in self.query("SELECT * FROM judgements WHERE seq > ? ORDER BY seq", seq):
            with self._sound():
                found = row["seq"], bool(row["undone"]), _judgement(row)
            yield found

    def keys(self) -> set[str]:
        """What is unique for each row of judgements."""
        return {row["key"] for row in self.query("SELECT key FROM judgements")}

    def become(self, other: LabelDatabase) -> None:
        """Hold what another database holds, in place of all that is here; other processes may have the file open."""
        with self._turn, other._turn:
            other._connection.backup(self._connection)

    def copy_to(self, target: Path) -> None:
        """Write the database as one file that is whole at any time, while others go on writing."""
        make_private(target)
        with contextlib.closing(sqlite3.connect(target)) as copy, self._turn:
            self._connection.backup(copy)


def spread(progress: dict[str, int]) -> dict[int, int]:
    """By number of labellers: how many items have that many."""
    return dict(sorted(Counter(progress.values()).items()))


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit the transaction that it is called in."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _item(row: sqlite3.Row) -> Item:
    gold = row["gold"]
    return Item(
        id=row["id"],
        prompt=row["prompt"],
        answers=tuple(json.loads(row["answers"])),
        priority=row["priority"],
        gold=None if gold is None else tuple(json.loads(gold)),
    )


def _judgement(row: sqlite3.Row) -> Judgement:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(row["judgement"]).items()
    }
    return Judgement(item=row["item"], labeller=row["labeller"], repeat=row["repeat"], **values)
