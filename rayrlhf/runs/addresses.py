"""Addresses of runs and models: an absolute path, or the URI of a folder in a store (`rayrlhf.runs.storage`).

    >>> join("s3://bucket/runs?region=eu", "one")
    's3://bucket/runs/one?region=eu'

This module imports nothing of pyarrow, which only a command with a store needs.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from rayrlhf.errors import UserError
from rayrlhf.files import cache_directory


def is_uri(address: str | Path) -> bool:
    """Whether the address is of a store."""
    return "://" in str(address)


def join(address: str | Path, *parts: str) -> str:
    """The address of something inside; a URI's options stay behind its path."""
    base, mark, options = str(address).partition("?")
    return "/".join([base.rstrip("/"), *parts]) + mark + options


def folder_name(address: str) -> str:
    """The name of the folder that a file is in.

    >>> folder_name("s3://bucket/one/comparisons.parquet?endpoint_override=http://host:9000")
    'one'
    """
    return Path(address.partition("?")[0] if is_uri(address) else address).parent.name


def as_typed(address: str) -> str:
    """A folder below the current directory as people write it; any other address as it is."""
    if is_uri(address) or not Path(address).is_relative_to(Path.cwd()):
        return address
    return str(Path(address).relative_to(Path.cwd()))


def local_path(address: str | Path) -> Path:
    """Where a process of this node finds what is at an address: there, or in the node's cache."""
    if not is_uri(address):
        return Path(address)
    base, _, options = str(address).partition("?")
    scheme, _, path = base.rstrip("/").partition("://")
    kind = f"{scheme}-{hashlib.blake2b(options.encode(), digest_size=4).hexdigest()}"
    return cache_directory() / kind / path.lstrip("/")


def runs_address(runs_dir: str, inside_job: bool) -> str:
    """`runs_dir` as an absolute path or as the URI of a store.

    A relative path counts from the current directory. `file://` is a path, and not a store.

    Raises:
        UserError: a relative path inside a job, whose working directory is a temporary copy; or a URI that names no
            bucket, holds a secret, or means the files of another machine.
    """
    parts = urlsplit(runs_dir)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(
                f"runs_dir={runs_dir}: a file URI has three slashes, as in file:///{parts.netloc}{parts.path}"
            )
        return str(Path(unquote(parts.path)))
    refuse_secrets(runs_dir)
    if is_uri(runs_dir):
        if not (parts.netloc + parts.path).strip("/"):
            raise UserError(f"runs_dir={runs_dir}: a URI names a bucket, as in s3://bucket/runs")
        return runs_dir
    path = Path(runs_dir).expanduser()
    if not path.is_absolute() and inside_job:
        raise UserError(
            f"runs_dir={runs_dir} is relative, and a job's working directory is a temporary copy; "
            "submit with runs_dir=/abs/path"
        )
    return os.path.abspath(path)


def refuse_secrets(uri: str) -> None:
    """Refuse a URI that holds a password: addresses are written into config.yaml and logs.

    Raises:
        UserError: the URI has a password, or a query key that looks like one.
    """
    parts = urlsplit(uri)
    secrets = [key for key in parse_qs(parts.query) if re.search(r"secret|token|password|key|^sig$|sas", key.lower())]
    if parts.password or secrets:
        raise UserError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: a URI is written into config.yaml and "
            f"logs and must hold no keys ({', '.join(secrets) or 'before the @'}); give them in the environment (AWS_*)"
        )
