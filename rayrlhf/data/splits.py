"""Splits by a hash of the record's id.

A record's split does not depend on its place in the file, on other prompts, or on Python's hash seed. So adding prompts
to a file moves none of the old ones, and every machine finds the same splits. Records of one prompt are in one split:
that of the smallest of their ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from rayrlhf.config_data import DataConfig
from rayrlhf.errors import UserError


class HasId(Protocol):
    """A record that can be split."""

    @property
    def id(self) -> str:
        """Its own."""

    @property
    def split_key(self) -> str:
        """The same for all records of a prompt."""


R = TypeVar("R", bound=HasId)
S = TypeVar("S")


@dataclass(frozen=True)
class Splits(Generic[S]):
    """The training records of the three stages; no record is in two of them."""

    sft: S
    reward_model: S
    """also of `dpo`, which learns from the same comparisons"""
    rl: S


def hash_fraction(record_id: str, salt: str) -> float:
    """Map an id to a number in [0, 1), the same on every machine. Another `salt` gives an independent number."""
    digest = hashlib.blake2b(f"{salt}\x1f{record_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: what a float holds exactly


def split_train(
    records: Iterable[R], data: DataConfig, *, reward_model: bool = True, rl: bool = True
) -> Splits[list[R]]:
    """Share the training records out to SFT, reward model and RL prompts, as `data` says.

    Args:
        records: in any order.
        data: the fractions.
        reward_model: whether a stage learns from comparisons; otherwise the share goes to RL.
        rl: whether the run has that stage; otherwise its share goes to those that learn from comparisons.

    Raises:
        UserError: an id appears twice.
    """
    splits: Splits[list[R]] = Splits([], [], [])
    for record in records:
        # The salt is part of the format: another one would move records between the splits of existing runs.
        place = hash_fraction(record.split_key, "train")
        if place < data.sft_fraction:
            splits.sft.append(record)
        elif reward_model and (not rl or place < data.sft_fraction + data.reward_model_fraction):
            splits.reward_model.append(record)
        else:
            splits.rl.append(record)
    check_disjoint(sft=splits.sft, reward_model=splits.reward_model, rl=splits.rl)
    return splits


def split_valid(records: Iterable[R], data: DataConfig) -> tuple[list[R], list[R]]:
    """Split validation records into (dev, test). Dev selects checkpoints; only the final evaluation reads test.

    Raises:
        UserError: an id appears twice.
    """
    dev: list[R] = []
    test: list[R] = []
    for record in records:
        (dev if hash_fraction(record.split_key, "valid") < data.dev_fraction else test).append(record)
    check_disjoint(dev=dev, test=test)
    return dev, test


def is_heldout(record_id: str, fraction: float) -> bool:
    """Say whether a prompt's comparisons stay out of the reward model's training, to measure its accuracy."""
    return hash_fraction(record_id, "heldout") < fraction


def check_disjoint(**splits: Sequence[HasId]) -> None:
    """Check that every id is in one split, once.

    Raises:
        UserError: an id is in two splits, or twice in one; the message names the first.
    """
    seen: dict[str, str] = {}
    for name, records in splits.items():
        for record in records:
            if record.id in seen:
                where = f"twice in {name}" if seen[record.id] == name else f"in {seen[record.id]} and in {name}"
                raise UserError(
                    f"record id {record.id!r} is {where}; ids must be unique over all splits, rename or remove one"
                )
            seen[record.id] = name
