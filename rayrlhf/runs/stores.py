"""The way to a store: pyarrow's file systems are imported when the first store is opened, and never for a directory."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from rayrlhf.runs.addresses import is_uri

if TYPE_CHECKING:
    from rayrlhf.runs.storage import Store


def open_store(address: str | Path) -> Store | None:
    """The store that holds this folder; None of a directory.

    Raises:
        UserError: pyarrow has no filesystem for the URI, or the store does not answer.
    """
    if not is_uri(address):
        return None
    from rayrlhf.runs.storage import Store

    return Store.open(str(address))


def store_errors(store: Store | None) -> AbstractContextManager[None]:
    """A block in which an error of the store becomes a UserError; without a store it changes nothing."""
    if store is None:
        return contextlib.nullcontext()
    from rayrlhf.runs.storage import as_user_error

    return as_user_error(store.address)


def lease(store: Store | None) -> AbstractContextManager[None]:
    """A block that holds the store's lease (`rayrlhf.runs.lease`); without a store it changes nothing."""
    if store is None:
        return contextlib.nullcontext()
    from rayrlhf.runs.lease import leased

    return leased(store)


def holder_of(store: Store) -> str | None:
    """The process that holds the store's lease, in words; None if none does."""
    from rayrlhf.runs.lease import lease_holder

    return lease_holder(store)
