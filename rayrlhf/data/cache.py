"""Tokenised records of data sets, kept in the user's cache, so that the next start takes seconds.

    RAYRLHF_CACHE/records/HASH/records.arrow    the records of a split (`rayrlhf.data.stored`)
    RAYRLHF_CACHE/records/HASH/facts.json       what became of the other rows

HASH is of all that decides the records: the bytes of the files, the settings of the sources, the tokenizer, and our own
code. So an entry is never out of date; what changes makes another one. An entry appears whole, by one rename, and two
processes that make the same one write the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayrlhf.data.stored import R, Records
from rayrlhf.data.tokens import leading_ids
from rayrlhf.data.turns import dialogues
from rayrlhf.files import cache_directory, sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS, _FACTS = "records.arrow", "facts.json"
KEPT_FROM = 1_000
"""Rows of all splits from which on the records are kept. To read fewer takes less than a second."""
_UNUSED_S = 30 * 24 * 3600
"""An entry that nobody has used for so long is deleted when another one is made."""


def digest(*ingredients: Any) -> str:
    """A hash of values that JSON has."""
    return hashlib.blake2b(json.dumps(ingredients, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how a fast tokenizer, and our code with it, makes token ids."""
    return digest(
        _code(),
        [version(name) for name in ("tokenizers", "transformers")],
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.special_tokens_map),
        leading_ids(tokenizer),
        str(tokenizer.chat_template),
        dialogues(tokenizer),  # as the template renders today: there are some that write the date
    )


def read_entry(kind: type[R], key: str) -> tuple[Records[R], dict[str, Any]] | None:
    """The records and the facts of an entry; None if there is none, or a damaged one."""
    entry = _directory() / key
    try:
        facts = json.loads((entry / _FACTS).read_bytes())
        records = Records.open(kind, entry / RECORDS)
        os.utime(entry)  # it is in use
    except FileNotFoundError:
        return None
    except (OSError, ValueError, pa.ArrowException):
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return records, facts


@contextmanager
def working_directory() -> Iterator[Path]:
    """A new directory, beside the entries if that can be written; what is left of it afterwards is deleted."""
    made = _directory() / f".{uuid.uuid4().hex}"
    try:
        made.mkdir(parents=True)
    except OSError:  # a home that is read-only, or full
        made = Path(tempfile.mkdtemp(prefix="rayrlhf-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def keep(directory: Path, key: str, facts: dict[str, Any]) -> bool:
    """Make an entry of a working directory that holds `RECORDS`; whether there is one now."""
    if directory.parent != _directory():
        return False
    (directory / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    sync_tree(directory)
    for other in _directory().iterdir():
        with suppress(FileNotFoundError):  # another process may delete it, too
            if time.time() - other.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)
    try:
        directory.rename(_directory() / key)
    except OSError:  # another process was first
        return (_directory() / key).is_dir()
    return True


def _directory() -> Path:
    return cache_directory() / "records"


@functools.lru_cache
def _code() -> str:
    """A hash of the code that makes the records."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
