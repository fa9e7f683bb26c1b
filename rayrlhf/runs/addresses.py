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
from urllib.parse import parse_qs, urlsplit

from rayrlhf.errors import UserError

CACHE = "RAYRLHF_CACHE"
"""Environment variable: where a node keeps its copies. Default: rayrlhf in XDG_CACHE_HOME or ~/.cache."""


def is_uri(address: str | Path) -> bool:
    """Whether the address is of a store."""
    return "://" in str(address)


def join(address: str | Path, *parts: str) -> str:
    """The address of something inside; a URI's options stay behind its path."""
    base, mark, options = str(address).partition("?")
    return "/".join([base.rstrip("/"), *parts]) + mark + options


def local_path(address: str | Path) -> Path:
    """Where a process of this node finds what is at an address: there, or in the node's cache."""
    if not is_uri(address):
        return Path(address)
    base, _, options = str(address).partition("?")
    scheme, _, path = base.rstrip("/").partition("://")
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rayrlhf"
    kind = f"{scheme}-{hashlib.blake2b(options.encode(), digest_size=4).hexdigest()}"
    return Path(os.environ.get(CACHE) or default).absolute() / kind / path.lstrip("/")


def refuse_secrets(uri: str) -> None:
    """
    Raises:
        UserError: a URI with a password, or with what looks like one in its query.
    """
    parts = urlsplit(uri)
    secrets = [key for key in parse_qs(parts.query) if re.search(r"secret|token|password|key|^sig$|sas", key.lower())]
    if parts.password or secrets:
        raise UserError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: a URI is written into config.yaml and "
            f"logs and must hold no keys ({', '.join(secrets) or 'before the @'}); give them in the environment (AWS_*)"
        )
