"""Rows, padding, micro-batches and shards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.batching import Row, collate, micro_batches, shard
from rayrlhf.epochs import Epochs

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def test_completion_predicts_the_response_only() -> None:
    row = Row.completion([7, 8, 9], [4, 5])
    assert row.ids.tolist() == [7, 8, 9, 4, 5]
    assert row.mask.tolist() == [False, False, False, True, True]


def test_the_first_token_is_never_predicted() -> None:
    assert Row.completion([], [4, 5, 6]).mask.tolist() == [False, True, True]


def test_collate_pads_on_the_right() -> None:
    batch = collate([Row.completion([7], [4, 5]), Row.completion([8, 9, 3], [6, 2])], pad_token_id=1)
    assert batch.input_ids.tolist() == [[7, 4, 5, 1, 1], [8, 9, 3, 6, 2]]
    assert batch.mask.tolist() == [[False, True, True, False, False], [False, False, False, True, True]]
    assert batch.lengths.tolist() == [3, 5]
    assert batch.counts == [2, 2]
    # Row-major: a flat [N] result splits back into rows by `counts`.
    assert batch.input_ids[batch.mask].split(batch.counts)[1].tolist() == [6, 2]


@given(LENGTHS, st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_bounds(lengths: list[int], max_tokens: int) -> None:
    cut = micro_batches(lengths, max_tokens)
    assert sorted(i for piece in cut for i in piece) == list(range(len(lengths)))
    for piece in cut:
        assert len(piece) * max(lengths[i] for i in piece) <= max_tokens or len(piece) == 1


def test_micro_batches_do_not_waste() -> None:
    assert len(micro_batches([10] * 8, 40)) == 2
    assert micro_batches([3, 50, 3], 20) == [[1], [0, 2]]


@given(LENGTHS, st.integers(1, 6))
def test_shard_deals_every_row_once_and_in_balance(lengths: list[int], world: int) -> None:
    dealt = shard(lengths, world)
    assert len(dealt) == world
    assert sorted(i for rows in dealt for i in rows) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in rows) for rows in dealt]
    # Longest first to the least loaded: no rank is ahead of another by more than one row.
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_every_epoch_uses_every_row_once_in_its_own_order() -> None:
    epochs = Epochs(count=10, batch_size=4, epochs=2, evals_per_epoch=1, seed=3)
    assert (epochs.steps_per_epoch, epochs.steps) == (3, 6)
    first, second = ([i for step in steps for i in epochs.batch(step)] for steps in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [len(epochs.batch(step)) for step in range(3)] == [4, 4, 2]
    assert first[:4] == Epochs(10, 4, 2, 1, 3).batch(0) != Epochs(10, 4, 2, 1, 4).batch(0)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 3))
def test_evaluations_are_evenly_spread_and_close_each_epoch(steps: int, evals: int, epochs_count: int) -> None:
    epochs = Epochs(count=steps, batch_size=1, epochs=epochs_count, evals_per_epoch=evals, seed=0)
    after = [step for step in range(epochs.steps) if epochs.evaluates_after(step)]
    assert len(after) == epochs_count * min(evals, steps)
    assert {(epoch + 1) * steps - 1 for epoch in range(epochs_count)} <= set(after)
    gaps = np.diff([-1, *after])
    assert gaps.max() - gaps.min() <= 1
