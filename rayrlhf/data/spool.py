"""Objects that wait in a temporary file, so that they take no memory until they are read again."""

from __future__ import annotations

import contextlib
import errno
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError

_CHUNK = 1024
"""Objects that are written and read at a time: pickle is then three times as fast as with one."""
_IN_MEMORY = 16 * 2**20
"""Bytes up to which there is no file."""


class Spool:
    """A list that grows and lives on disk. To read it in order is fast; this process alone sees the file."""

    def __init__(self) -> None:
        # Without a name: it vanishes with the process, however that ends.
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._chunks: list[tuple[int, int]] = []
        """Where each chunk begins, and its size in bytes."""
        self._last: list[Any] = []
        """What is not written yet."""
        self._read: tuple[int, Sequence[Any]] = -1, ()
        """The chunk that was read last."""

    def __len__(self) -> int:
        return len(self._chunks) * _CHUNK + len(self._last)

    def add(self, item: Any) -> int:
        """Append an object; returns its place."""
        place = len(self)
        self._last.append(item)
        if len(self._last) == _CHUNK:
            begin, packed = self._file.seek(0, 2), pickle.dumps(self._last, protocol=5)
            with written_into(Path(tempfile.gettempdir()), "TMPDIR"):
                self._file.write(packed)
                self._file.flush()
            self._chunks.append((begin, len(packed)))
            self._last = []
        return place

    def __getitem__(self, place: int) -> Any:
        number, offset = divmod(place, _CHUNK)
        if number == len(self._chunks):
            return self._last[offset]
        if number != self._read[0]:
            begin, size = self._chunks[number]
            self._file.seek(begin)
            self._read = number, pickle.loads(self._file.read(size))
        return self._read[1][offset]


@contextlib.contextmanager
def written_into(directory: Path, variable: str) -> Iterator[None]:
    """A block that writes into a directory that no config names.

    Args:
        directory: where it is.
        variable: the environment variable that names another one.

    Raises:
        UserError: its disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory}: no space is left on its disk; make room, or name a directory elsewhere: {variable}=DIR"
        ) from error
