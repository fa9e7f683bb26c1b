"""The replies of judges, on this node's disk: later runs, and a run that starts again, do not pay for them twice."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

from rayrlhf.errors import one_line

log = logging.getLogger(__name__)

FILE = "judge_replies.sqlite"
BUSY_S = 10
"""How long to wait for other processes of the node that write at the moment."""


class Replies:
    """Replies by the question that they answer. Several processes of a node may use one directory.

    A file that is damaged, locked for long, or on a full disk is reported in one line and then left alone: no run ends
    because of it.
    """

    def __init__(self, directory: str | None) -> None:
        """Without a directory nothing is kept."""
        self.directory = directory
        self._connection: sqlite3.Connection | None = None
        self.keeps = directory is not None
        """Whether replies are kept; no more once something went wrong."""

    def __getstate__(self) -> dict[str, Any]:
        """Each process has its own connection."""
        return self.__dict__ | {"_connection": None}

    @staticmethod
    def key(url: str, body: Any) -> str:
        """Of a question: the same only if address, model, text and all settings are."""
        return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The reply; None if none is known."""
        rows = self._do("SELECT reply FROM replies WHERE question = ?", key)
        return str(rows[0][0]) if rows else None

    def put(self, key: str, reply: str) -> None:
        """Keep a reply: it is there after this process has been killed."""
        self._do("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, reply)

    def _do(self, statement: str, *values: str) -> list[Any]:
        if not self.keeps:
            return []
        try:
            if self._connection is None:
                self._connection = self._open()
            return self._connection.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self.keeps = False
            log.warning(
                "%s/%s: %s; this process goes on without kept replies, and pays for those to come",
                self.directory, FILE, one_line(error),
            )  # fmt: skip
            return []

    def _open(self) -> sqlite3.Connection:
        directory = Path(str(self.directory)).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        # No transactions: each reply is kept by itself. Calls come one after the other, but not from one thread alone.
        connection = sqlite3.connect(directory / FILE, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")  # readers need not wait for a writer
        connection.execute("PRAGMA synchronous = NORMAL")  # safe but for the last replies before a power cut
        connection.execute("CREATE TABLE IF NOT EXISTS replies (question TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        return connection
