"""The files that a URI names: one file, a pattern, or a directory, in any store that pyarrow knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs as fs

from rayrlhf.data.files import DataFile, first_line
from rayrlhf.errors import UserError


@dataclass(frozen=True)
class Remote:
    """What is at a URI."""

    files: list[DataFile]
    """One file, or those that match a pattern."""
    directory: dict[str, DataFile]
    """Of a directory, the files in it and below by their paths inside; empty of anything else."""


def find(uri: str) -> Remote:
    """Look up a URI, whose options, such as a region, stand behind a question mark.

    Raises:
        UserError: it cannot be opened, or there is nothing.
    """
    scheme = uri.partition("://")[0]
    address, mark, options = uri.partition("?")
    address = address.rstrip("/")
    fixed = address.partition("*")[0].rpartition("/")[0] if "*" in address else address

    def named(info: fs.FileInfo) -> DataFile:
        return DataFile(f"{scheme}://{info.path.lstrip('/')}", info.path, filesystem)

    try:
        filesystem, base = fs.FileSystem.from_uri(fixed + mark + options)
        (at,) = filesystem.get_file_info([base])
        if at.is_file:
            return Remote([named(at)], {})
        found = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{uri}: cannot be opened ({first_line(error)}); check the address and its access") from None
    inside = {each.path.removeprefix(base).lstrip("/"): each for each in found if each.is_file}
    if fixed != address:
        pattern = _expression(address.removeprefix(fixed).lstrip("/"))
        seen = [name for name in sorted(inside) if not any(part.startswith(".") for part in name.split("/"))]
        files = [named(inside[name]) for name in seen if pattern.fullmatch(name)]
        if files:
            return Remote(files, {})
        raise UserError(f"{uri}: no such file matches this pattern")
    # A key of a bucket may hold anything, but a path that leaves the directory is none of it.
    usual = [name for name in sorted(inside) if not {"", ".", ".."} & set(PurePosixPath(name).parts)]
    if usual:
        return Remote([], {name: named(inside[name]) for name in usual})
    folder = address.rpartition("/")[0]
    raise UserError(
        f"{uri}: no such file or directory; name a file, a directory, or a pattern such as {folder}/*.parquet"
    )


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as `glob` has it: `*` is anything but a slash, `**` any number of directories."""
    escaped = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.compile(escaped)
