"""Rows, padding, micro-batches and shards."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.epochs import Epochs
from rayrlhf.data.rows import Row, shard
from rayrlhf.models.batching import TokenBatch, collate, micro_batches, pack, token_batches

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
    assert batch.targets.split(batch.counts)[1].tolist() == [6, 2]
    flat = batch.input_ids.flatten()
    assert flat[batch.states].tolist() == [7, 4, 3, 6], "the state before each predicted token"
    assert flat[batch.ends].tolist() == [5, 2]
    assert batch.positions is None and not batch.pieces, "plain causal attention needs neither"


def seen(batch: TokenBatch) -> list[str]:
    """What each token of a packed batch sees, written out from its pieces."""
    found: list[str] = []
    prompt = prompt_start = start = 0
    for piece in batch.pieces:
        for _ in range(piece.sequences if piece.mask is None else 1):
            own = torch.ones(piece.length, piece.length).tril() if piece.mask is None else piece.mask[:, prompt:]
            before = torch.zeros(piece.length, start)
            if piece.mask is not None:
                before[:, prompt_start : prompt_start + prompt] = piece.mask[:, :prompt]
            else:
                prompt, prompt_start = piece.length, start
            rows = torch.cat([before, own], dim=1)
            start += piece.length
            found += ["".join("x" if each else "." for each in row) for row in rows]
    return [row.ljust(start, ".") for row in found]


def test_packed_rows_have_their_prompt_in_common_and_no_padding() -> None:
    rows = [Row.completion([7, 8], [4, 5]), Row.completion([7, 8], [6]), Row.completion([9], [3, 2]),
            Row.completion([3, 9], [2])]  # fmt: skip
    batch = pack(rows, shares=[2, 1, 1])
    assert batch.input_ids.tolist() == [[7, 8, 4, 5, 6, 9, 3, 2, 3, 9, 2]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 0, 1, 2]]
    assert batch.targets.tolist() == [4, 5, 6, 3, 2, 2] and batch.counts == [2, 1, 2, 1]
    assert batch.states.tolist() == [1, 2, 1, 5, 6, 9], "both answers start from the prompt's last state"
    assert batch.ends.tolist() == [3, 4, 7, 10]
    assert seen(batch) == [
        "x..........",
        "xx.........",
        "xxx........",
        "xxxx.......",
        "xx..x......",
        ".....x.....",
        ".....xx....",
        ".....xxx...",
        "........x..",
        "........xx.",
        "........xxx",
    ]
    assert [(piece.sequences, piece.length) for piece in batch.pieces] == [(1, 2), (1, 2), (1, 1), (2, 3)]


@given(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=2, max_size=30))
def test_answers_that_are_attended_to_together_are_no_longer_than_their_prompt(prompt: int, answers: list[int]) -> None:
    rows = [Row.completion([3] * prompt, range(9, 9 + length)) for length in answers]
    first, *others = pack(rows, shares=[len(rows)]).pieces
    assert (first.sequences, first.length, first.mask) == (1, prompt, None)
    assert sum(piece.length for piece in others) == sum(answers)
    assert all(piece.mask is not None and piece.mask.shape == (piece.length, prompt + piece.length) for piece in others)
    assert all(piece.length <= max(prompt, *answers) for piece in others)
    assert sum(int(piece.mask.sum()) for piece in others if piece.mask is not None) == sum(
        n * prompt + n * (n + 1) // 2 for n in answers
    )


@st.composite
def rows_of_few_prompts(draw: st.DrawFn) -> list[Row]:
    prompts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    drawn = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 30)), max_size=30))
    return [Row.completion([3 + which] * prompts[which], range(9, 9 + length)) for which, length in drawn]


@given(rows_of_few_prompts(), st.integers(1, 500), st.booleans())
def test_token_batches_hold_every_row_once_within_bounds(rows: list[Row], max_tokens: int, packed: bool) -> None:
    taken: list[int] = []
    for indices, batch in token_batches(rows, max_tokens, 1, "cpu", packed=packed):
        taken += indices
        assert batch.input_ids.numel() <= max_tokens or len(indices) == 1
        assert len(batch.input_ids) == (1 if packed else len(indices))
        assert batch.counts == [int(rows[i].mask.sum()) for i in indices]
        assert batch.targets.tolist() == [int(t) for i in indices for t in rows[i].ids[rows[i].mask]]
        assert batch.input_ids.flatten()[batch.ends].tolist() == [int(rows[i].ids[-1]) for i in indices]
        assert sum(piece.sequences * piece.length for piece in batch.pieces) == (
            batch.input_ids.numel() if packed else 0
        )
    assert sorted(taken) == list(range(len(rows)))


@given(rows_of_few_prompts(), st.integers(1, 500), st.booleans())
def test_rows_of_a_group_stay_together_and_in_order(rows: list[Row], max_tokens: int, packed: bool) -> None:
    groups = [row.prompt_key for row in rows]
    taken = []
    for indices, batch in token_batches(rows, max_tokens, 1, "cpu", packed=packed, groups=groups):
        taken += indices
        whole = {groups[i]: [j for j, group in enumerate(groups) if group == groups[i]] for i in indices}
        assert indices == [i for group in whole.values() for i in group]
        assert batch.input_ids.numel() <= max_tokens or len(whole) == 1
    assert sorted(taken) == list(range(len(rows)))


def test_packed_batches_compute_every_prompt_once_and_nothing_else() -> None:
    rows = [Row.completion([3] * 20 + [k], [7] * n) for k in range(5) for n in (4, 9, 1)]
    (only,) = token_batches(rows, 1000, 1, "cpu", packed=True)
    assert only[1].input_ids.numel() == 5 * (21 + 14)
    cut = [batch.input_ids.numel() for _, batch in token_batches(rows, 70, 1, "cpu", packed=True)]
    assert cut == [70, 70, 35]
    without = [Row(row.ids, row.mask) for row in rows]
    assert sum(b.input_ids.numel() for _, b in token_batches(without, 70, 1, "cpu", packed=True)) == 5 * (3 * 21 + 14)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60)), max_size=40), st.integers(1, 300))
def test_micro_batches_hold_every_item_once_within_bounds(sizes: list[tuple[int, int]], max_tokens: int) -> None:
    sizes = sorted(sizes, key=lambda size: -size[1])
    cut = micro_batches(sizes, max_tokens)
    assert [i for piece in cut for i in piece] == list(range(len(sizes)))
    for piece in cut:
        assert sum(sizes[i][0] for i in piece) * max(sizes[i][1] for i in piece) <= max_tokens or len(piece) == 1


def test_micro_batches_do_not_waste() -> None:
    assert len(micro_batches([(1, 10)] * 8, 40)) == 2
    assert micro_batches([(1, 50), (1, 3), (1, 3)], 20) == [[0], [1, 2]]
    assert micro_batches([(50, 1), (3, 1), (9, 1), (9, 1)], 20) == [[0], [1, 2], [3]]


@given(LENGTHS, st.integers(1, 6))
def test_shard_deals_every_row_once_and_in_balance(lengths: list[int], world: int) -> None:
    dealt = shard(lengths, world)
    assert len(dealt) == world
    assert sorted(i for rows in dealt for i in rows) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in rows) for rows in dealt]
    # Longest first to the least loaded: no rank is ahead of another by more than one row.
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=40), st.integers(1, 6))
def test_shard_keeps_groups_together_while_there_are_enough(rows: list[tuple[int, int]], world: int) -> None:
    groups, lengths = [group for group, _ in rows], [length for _, length in rows]
    dealt = shard(lengths, world, groups)
    assert sorted(i for own in dealt for i in own) == list(range(len(rows)))
    if len(set(groups)) >= world:
        assert sum(len({groups[i] for i in own}) for own in dealt) == len(set(groups))
        assert all(dealt), "every rank has work"
    else:
        assert dealt == shard(lengths, world)


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
