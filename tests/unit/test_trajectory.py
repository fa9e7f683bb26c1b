"""A trajectory arrives as it was sent."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields

import numpy as np
import pytest
from ray import cloudpickle

from rayrlhf.trajectory import Trajectory


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("prompt", [0, 1, 7])
def test_a_trajectory_survives_its_journey(scored: bool, prompt: int) -> None:
    rng = np.random.default_rng(prompt)
    sent = Trajectory(
        prompt_id="a-β",
        sample_index=3,
        seed=2**31 - 1,
        prompt_ids=rng.integers(0, 2**31 - 1, prompt),
        response_ids=rng.integers(0, 2**31 - 1, 5),
        generator_logprobs=rng.normal(size=5).astype(np.float32),
        versions=rng.integers(0, 2**40, 5),
        finish_reason="eos",
        rewards={"one": 0.1, "two": -1.0} if scored else {},
        ref_logprobs=rng.normal(size=5).astype(np.float32) if scored else None,
        gold=0.25 if scored else None,
    )
    for got in (pickle.loads(pickle.dumps(sent)), cloudpickle.loads(cloudpickle.dumps(sent)), copy.deepcopy(sent)):
        for field in fields(Trajectory):
            own, expected = getattr(got, field.name), getattr(sent, field.name)
            np.testing.assert_array_equal(own, expected)
            if isinstance(expected, np.ndarray):
                assert own.dtype == expected.dtype and own.flags.writeable
