"""A trajectory arrives as it was sent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle

from actors.pools.remote import dump, load
from rayrlhf.trajectory import Minimum, SerializedTrajectory, Trajectory


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    rng, response = np.random.default_rng(draw(st.integers(0, 1000))), draw(st.integers(1, 40))
    scored = draw(st.booleans())
    return Trajectory(
        prompt_id=draw(st.text(max_size=5)),
        sample_index=draw(st.integers(0, 64)),
        seed=draw(st.integers(0, 2**31 - 1)),
        prompt_ids=rng.integers(0, 2**31 - 1, draw(st.integers(0, 40))),
        response_ids=rng.integers(0, 2**31 - 1, response),
        generator_logprobs=rng.normal(size=response).astype(np.float32),
        versions=rng.integers(0, 2**40, response),
        finish_reason=draw(st.sampled_from(["eos", "length"])),
        rewards={"one": 0.1, "two": -1.0} if scored else {},
        ref_logprobs=rng.normal(size=response).astype(np.float32) if scored else None,
        gold=draw(st.none() | st.floats(-1, 1)),
        counted=draw(st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2)),
        minimum=draw(st.none() | st.builds(Minimum, st.integers(1, 9), st.tuples(st.integers(0, 9), st.just(2)))),
    )


def packed(sent: Trajectory) -> Trajectory:
    return SerializedTrajectory.of(sent).load()


def packed_twice_on_its_way(sent: Trajectory) -> Trajectory:
    """As by a scorer, between two messages."""
    first: SerializedTrajectory = load(dump(SerializedTrajectory.of(sent)))
    second: SerializedTrajectory = cloudpickle.loads(cloudpickle.dumps(SerializedTrajectory.of(first.load())))
    return second.load()


@pytest.mark.parametrize(
    "journey",
    [
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: cloudpickle.loads(cloudpickle.dumps(t)),
        copy.deepcopy,
        packed,
        packed_twice_on_its_way,
    ],
)
@given(sent=trajectories())
def test_a_trajectory_survives_its_journey(journey: Callable[[Trajectory], Trajectory], sent: Trajectory) -> None:
    got = journey(sent)
    for field in fields(Trajectory):
        own, expected = getattr(got, field.name), getattr(sent, field.name)
        np.testing.assert_equal(own, expected)
        if isinstance(expected, np.ndarray):
            assert own.dtype == expected.dtype and own.flags.writeable


@given(sent=trajectories())
def test_what_stands_beside_a_packed_trajectory_is_its_own(sent: Trajectory) -> None:
    packed = SerializedTrajectory.of(sent)
    assert packed.length == len(sent.token_ids) and packed.written_tokens == len(sent.response_ids)
    assert (packed.oldest, packed.newest) == (sent.versions.min(), sent.versions.max())
    assert packed.version_sum == sent.versions.sum()
    assert (packed.sample_index, packed.gold) == (sent.sample_index, sent.gold)
    assert packed.counted == sent.counted
