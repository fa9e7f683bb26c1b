"""One small object of a store, written only if nobody has written it meanwhile: pyarrow has no such write, obstore has.

S3 (`If-None-Match`, `If-Match`), Google's and Azure's stores compare and write in one step.
"""

from __future__ import annotations

import configparser
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from rayrlhf.errors import UserError
from rayrlhf.runs.storage import Store

_RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
_TIMEOUTS: Any = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=10)}


class ChangedError(Exception):
    """Somebody else has written the object."""


@dataclass(frozen=True)
class Version:
    """What an object held when it was read or written."""

    content: str
    tag: Any
    """The store's own name of this version: ETag, or generation."""


class ConditionalObject:
    """An object directly in a store's folder. What goes wrong with the store is an OSError of one line."""

    def __init__(self, store: Store, name: str) -> None:
        """
        Raises:
            UserError: the store has no conditional writes.
        """
        self._bucket, prefix = _bucket(store)
        self._path = f"{prefix}/{name}".lstrip("/")

    def read(self) -> Version | None:
        """The newest version; None if there is no object."""
        with _one_line():
            try:
                found = obstore.get(self._bucket, self._path)
            except FileNotFoundError:
                return None
            return Version(bytes(found.bytes()).decode(), _tag(found.meta))

    def write(self, content: str, before: Version | None) -> Version:
        """Make this the content if the object is still as `before`; None: if there is none.

        Raises:
            ChangedError: it is not.
        """
        with _one_line():
            mode: Any = "create" if before is None else before.tag
            return Version(content, _tag(obstore.put(self._bucket, self._path, content.encode(), mode=mode)))


def _tag(facts: Any) -> dict[str, str]:
    """S3 and Azure go by the ETag, Google by the generation, which obstore calls the version."""
    return {name: facts[name] for name in ("e_tag", "version") if facts[name] is not None}


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (AlreadyExistsError, PreconditionError) as error:
        raise ChangedError from error
    except (BaseError, FileNotFoundError) as error:
        raise OSError(" ".join(str(error).split())[:400]) from None


def _bucket(store: Store) -> tuple[Any, str]:
    """obstore's object for the bucket that pyarrow has opened, and the folder's path in it.

    Raises:
        UserError: not one of the three kinds.
    """
    parts = urlsplit(store.address)
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    name, _, prefix = store.root.partition("/")
    common: Any = {"retry_config": _RETRIES}
    match parts.scheme:
        case "s3":
            endpoint = options.get("endpoint_override")
            if endpoint and "://" not in endpoint:
                endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
            plain = bool(endpoint) and str(endpoint).startswith("http://")
            more: Any = {"endpoint": endpoint} if endpoint else {}
            more |= _profile_keys()
            region = store.filesystem.region
            client: Any = {**_TIMEOUTS, "allow_http": plain}
            return S3Store(name, region=region, client_options=client, **more, **common), prefix
        case "gs" | "gcs":
            if "endpoint_override" in options:
                raise UserError(f"{store.address}: endpoint_override is for s3; set GOOGLE_BASE_URL and leave it out")
            return GCSStore(name, client_options=_TIMEOUTS, **common), prefix
        case "abfs" | "abfss":
            host = parts.hostname or ""
            account: Any = {"account_name": host.partition(".")[0]} if host.endswith(".windows.net") else {}
            return AzureStore(name, client_options=_TIMEOUTS, **account, **common), prefix
    raise UserError(
        f"{store.address}: runs are kept in s3://, gs:// or abfs://, whose conditional writes keep two processes from "
        "writing into one run; mount other stores as a directory"
    )


def _profile_keys() -> dict[str, str]:
    """Keys of ~/.aws/credentials, which pyarrow reads and obstore does not; none where the environment has some."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    found = configparser.ConfigParser(interpolation=None)
    found.read(Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser())
    profile = os.environ.get("AWS_PROFILE", "default")
    if profile not in found:
        return {}
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
             "aws_session_token": "session_token"}  # fmt: skip
    return {ours: found[profile][theirs] for theirs, ours in names.items() if theirs in found[profile]}
