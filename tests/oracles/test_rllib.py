"""Generalised advantages against RLlib's `compute_value_targets`.

RLlib's function takes one flat run of steps in which `terminateds` marks the ends of episodes, computes in numpy and
returns value targets (advantage + value) in float32; ours takes [B, R] padded rows and a mask. Concatenated responses
with `terminateds` at each last token are the same problem: nothing follows a response, so nothing is bootstrapped.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets
from torch.nn.utils.rnn import pad_sequence

from rayrlhf.algorithms.advantages import generalized_advantages

LENGTHS = (7, 1, 4, 12, 2)


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.3, 0.0])
def test_returns_of_ragged_responses_are_rllibs_value_targets(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, sum(LENGTHS)))
    last = np.zeros(sum(LENGTHS), np.bool_)
    last[np.cumsum(LENGTHS) - 1] = True
    targets = compute_value_targets(values, rewards, last, np.zeros_like(last), gamma, lam)

    def rows(flat: np.ndarray) -> torch.Tensor:
        pieces = torch.from_numpy(flat).split(LENGTHS)
        return pad_sequence(pieces, batch_first=True, padding_value=float("nan"))

    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    advantages, returns = generalized_advantages(rows(rewards), rows(values), mask, gamma, lam)
    np.testing.assert_allclose(returns[mask], targets, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(advantages[mask], targets - values, rtol=1e-5, atol=1e-6)
