"""The labels of a run in a store: the database of the page's machine, and the copy of it that other machines read.

The page writes a database on its own machine, as SQLite needs a local disk, and copies it into the store while people
work. The stage `collect` and the reports read that copy where the page is on another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.runs.folder import RunFolder
from rayrlhf.terminal import say

COPY_S = 30.0
"""How often the page copies the labels of a run in a store there, and how often `collect` looks for a newer copy."""
_MACHINE = "machine"
"""The setting of a database that says where it was written last."""


def copy_labels_out(run: RunFolder, database: LabelDatabase) -> None:
    """Write the labels of a run in a store there; in a directory nothing has to be done."""
    if run.store:
        database.remember(_MACHINE, _here(run))
        with replacing(run.labels_copy) as temporary:
            database.copy_to(temporary)
        run.upload(run.labels_copy)


def offer_labels(run: RunFolder, database: LabelDatabase) -> None:
    """Let a page on another machine begin with this database, unless the store has labels already."""
    if run.store and run.read(run.labels_copy) is None:
        copy_labels_out(run, database)


def share_labels(base: RunFolder, run: RunFolder) -> None:
    """Give a run that takes over what people ranked their judgements, too, unless it has some.

    They are copied and not linked, as people may go on with either. Where they cannot be read, a line says so.
    """
    if run.labels.exists():
        return
    try:
        with labels_to_read(base) as labels:
            if labels is None:
                return
            with replacing(run.labels) as temporary:
                labels.copy_to(temporary)
                temporary.chmod(0o600)
    except UserError as error:  # the comparisons are enough to go on
        say(f"what people said is not taken over: {error}")
        return
    with contextlib.closing(LabelDatabase(run.labels)) as own:
        copy_labels_out(run, own)


def begin_with_labels(run: RunFolder) -> None:
    """Go on with the labels that a page on another machine has put into the store, if it was the last one.

    Raises:
        UserError: this machine has judgements that those lack.
    """
    with contextlib.ExitStack() as stack:
        newest = stack.enter_context(contextlib.closing(Newest(run, None)))
        if not newest.changed() or newest.database is None:
            return
        own = stack.enter_context(contextlib.closing(LabelDatabase(run.labels)))
        if lost := len(own.keys() - newest.database.keys()):
            raise UserError(
                f"{run.labels} has {lost} judgements that a page on another machine did not have, whose labels are in "
                f"{newest.database.recall(_MACHINE)}; move one of the files away, and go on where the other is"
            )
        own.become(newest.database)


class Newest:
    """The labels of a run as they were written last: by a page on this machine, or by one that copies into the store.

    `database` is to be read only. It is the one that was given, or a copy that `close` ends.
    """

    def __init__(self, run: RunFolder, own: LabelDatabase | None) -> None:
        """`own` is the database of this machine; None if it is not to be read."""
        self.database = own
        self._run, self._own = run, own
        self._seen = b""
        self._looked = float("-inf")
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def changed(self) -> bool:
        """Whether `database` is another one now. The store is asked every `COPY_S` seconds."""
        if not self._run.store or time.monotonic() - self._looked < COPY_S:
            return False
        self._looked = time.monotonic()
        kept = self._run.read(self._run.labels_copy)
        digest = b"" if kept is None else hashlib.blake2b(kept, digest_size=16).digest()
        if kept is None or digest == self._seen:
            return False
        self._seen = digest
        self._directory = self._directory or tempfile.TemporaryDirectory(prefix="labels")
        path = Path(self._directory.name) / f"{digest.hex()}.sqlite"
        path.write_bytes(kept)
        found = LabelDatabase(path)
        if found.recall(_MACHINE) != _here(self._run):
            return self._take(found)
        found.close()
        return self.database is not self._own and self._take(self._own)

    def close(self) -> None:
        """End the copy; `own` stays open."""
        self._take(self._own)
        if self._directory is not None:
            self._directory.cleanup()

    def _take(self, database: LabelDatabase | None) -> bool:
        if self.database is not None and self.database is not self._own:
            self.database.close()
        self.database = database
        return True


@contextlib.contextmanager
def labels_to_read(run: RunFolder) -> Iterator[LabelDatabase | None]:
    """The labels of a run as they were written last; None if there are none."""
    with contextlib.ExitStack() as stack:
        own = None
        if run.labels.exists():
            own = stack.enter_context(contextlib.closing(LabelDatabase(run.labels)))
        newest = stack.enter_context(contextlib.closing(Newest(run, own)))
        newest.changed()
        yield newest.database


def _here(run: RunFolder) -> str:
    """This machine's file of the run's labels."""
    return f"{socket.gethostname()}:{run.labels}"
