"""Rows, padding, micro-batches and shards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.batching import Row, collate, micro_batches, shard, token_batches
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
    assert batch.targets.split(batch.counts)[1].tolist() == [6, 2]
    flat = batch.input_ids.flatten()
    assert flat[batch.states].tolist() == [7, 4, 3, 6], "the state before each predicted token"
    assert flat[batch.ends].tolist() == [5, 2]
    assert batch.positions is None and batch.visible() is None, "plain causal attention needs neither"


def test_answers_to_one_prompt_share_its_line() -> None:
    rows = [Row.completion([7, 8], [4, 5]), Row.completion([7, 8], [6]), Row.completion([9], [3, 2, 2])]
    batch = collate(rows, pad_token_id=1, lines=[2, 1])
    assert batch.input_ids.tolist() == [[7, 8, 4, 5, 6], [9, 3, 2, 2, 1]]
    visible = batch.visible()
    assert batch.positions is not None and visible is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 0]]
    assert batch.targets.tolist() == [4, 5, 6, 3, 2, 2] and batch.counts == [2, 1, 3]
    assert batch.states.tolist() == [1, 2, 1, 5, 6, 7], "both answers start from the prompt's last state"
    assert batch.ends.tolist() == [3, 4, 8]
    sees = ["".join("x" if seen else "." for seen in row) for row in visible[0, 0]]
    assert sees == ["x....", "xx...", "xxx..", "xxxx.", "xx..x"]
    assert all(row[: i + 1].any() for i, row in enumerate(visible[1, 0])), "padding sees something, or is NaN"


@st.composite
def rows_of_few_prompts(draw: st.DrawFn) -> list[Row]:
    prompts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    drawn = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 30)), max_size=30))
    return [Row.completion([3 + which] * prompts[which], range(9, 9 + length)) for which, length in drawn]


@given(rows_of_few_prompts(), st.integers(1, 500), st.booleans())
def test_token_batches_hold_every_row_once_within_bounds(rows: list[Row], max_tokens: int, share: bool) -> None:
    seen: list[int] = []
    for indices, batch in token_batches(rows, max_tokens, 1, "cpu", share=share):
        seen += indices
        assert batch.input_ids.numel() <= max_tokens or len(indices) == 1
        assert share or len(batch.input_ids) == len(indices)
        assert batch.counts == [int(rows[i].mask.sum()) for i in indices]
        assert batch.targets.tolist() == [int(t) for i in indices for t in rows[i].ids[rows[i].mask]]
        assert batch.input_ids.flatten()[batch.ends].tolist() == [int(rows[i].ids[-1]) for i in indices]
    assert sorted(seen) == list(range(len(rows)))


@given(rows_of_few_prompts(), st.integers(1, 500), st.booleans())
def test_rows_of_a_group_stay_together_and_in_order(rows: list[Row], max_tokens: int, share: bool) -> None:
    groups = [row.prompt_key for row in rows]
    seen = []
    for indices, batch in token_batches(rows, max_tokens, 1, "cpu", share=share, groups=groups):
        seen += indices
        whole = {groups[i]: [j for j, group in enumerate(groups) if group == groups[i]] for i in indices}
        assert indices == [i for group in whole.values() for i in group]
        assert batch.input_ids.numel() <= max_tokens or len(whole) == 1
    assert sorted(seen) == list(range(len(rows)))


def lines(prompt: int, length: int, max_tokens: int = 100_000) -> list[int]:
    """How many of 40 answers of one length share each line."""
    rows = [Row.completion([3] * prompt, [7] * length) for _ in range(40)]
    found = [batch for _, batch in token_batches(rows, max_tokens, 1, "cpu", share=True)]
    return [int(n) for batch in found for n in ([1] * 40 if batch.segments is None else batch.segments.amax(1))]


def test_lines_are_as_long_as_pays() -> None:
    """The cost of an answer, written out and searched for its least, with attention at 1 / 1024 of a token a pair."""
    for prompt, length in ((10, 48), (40, 48), (80, 48), (300, 48), (5, 200), (300, 200)):
        cost = {m: prompt / m + length + (prompt + m * length) ** 2 / m / 1024 for m in range(1, 41)}
        best = min(cost, key=lambda m: cost[m])
        found = max(lines(prompt, length))
        assert sum(lines(prompt, length)) == 40
        assert abs(found - best) <= 1 and cost[found] <= 1.02 * cost[best]
    assert max(lines(300, 48)) > max(lines(80, 48)) > max(lines(10, 48)) > max(lines(5, 200)) == 1
    assert max(lines(300, 48, max_tokens=300 + 3 * 48)) == 3, "a line is no longer than a batch may be"


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60)), max_size=40), st.integers(1, 300))
def test_micro_batches_hold_every_item_once_within_bounds(sizes: list[tuple[int, int]], max_tokens: int) -> None:
    cut = micro_batches(sizes, max_tokens)
    assert sorted(i for piece in cut for i in piece) == list(range(len(sizes)))
    for piece in cut:
        assert sum(sizes[i][0] for i in piece) * max(sizes[i][1] for i in piece) <= max_tokens or len(piece) == 1


def test_micro_batches_do_not_waste() -> None:
    assert len(micro_batches([(1, 10)] * 8, 40)) == 2
    assert micro_batches([(1, 3), (1, 50), (1, 3)], 20) == [[1], [0, 2]]


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
