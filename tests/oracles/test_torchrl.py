"""GAE and the two clipped losses against torchrl.

torchrl's functional estimators take [B, T, 1] tensors with the next state's value and `done` flags. Rows of R tokens
become T = R steps with `done` at the last token; the padding behind it is further steps of zeros, which cannot reach
back over a `done`. It keeps the discount in float32, hence the tolerance.

Its `ClipPPOLoss` wants modules: the actor here is a table of logits and the critic a table of values, so that its
log-probs, ratios and gradients are those of the tokens we hand to our own losses. Its value loss is (V - R)^2 without
the half, and it clips log ratios where we clip ratios: the same bounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate, vec_generalized_advantage_estimate

from rayrlhf.algorithms.advantages import generalized_advantages
from rayrlhf.algorithms.losses import policy_loss, value_loss

LENGTHS = torch.tensor([7, 1, 4, 12, 2])
TOKENS, VOCABULARY = 400, 11


@pytest.mark.parametrize("estimate", [generalized_advantage_estimate, vec_generalized_advantage_estimate])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.97, 0.95), (0.9, 0.3)])
def test_gae_of_ragged_responses(estimate: Any, gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    mask = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]
    rewards, values = (torch.where(mask, torch.randn(mask.shape, dtype=torch.float64), 0.0) for _ in range(2))
    done = torch.arange(mask.shape[1]) >= LENGTHS[:, None] - 1
    next_values = torch.cat([values[:, 1:], torch.zeros(len(values), 1, dtype=torch.float64)], 1)
    columns = (x.unsqueeze(-1) for x in (values, next_values, rewards, done))
    advantages, targets = (x.squeeze(-1) for x in estimate(gamma, lam, *columns))
    found = generalized_advantages(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(found.advantages[mask], advantages[mask], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.returns[mask], targets[mask], rtol=1e-6, atol=1e-6)


class Table(nn.Module):
    """Row i of the table for observation i."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.rows[index.squeeze(-1)]


@pytest.mark.parametrize("clip_range", [0.2, 0.05])
def test_clipped_losses_and_their_gradients(clip_range: float) -> None:
    torch.manual_seed(0)
    index = torch.arange(TOKENS)
    actions = torch.randint(VOCABULARY, (TOKENS,))
    old_logits = torch.randn(TOKENS, VOCABULARY)
    old_logprobs = old_logits.log_softmax(-1)[index, actions]
    old_values, returns, advantages = torch.randn(3, TOKENS)
    logits = Table(old_logits + 0.3 * torch.randn(TOKENS, VOCABULARY))
    values = Table((old_values + 0.3 * torch.randn(TOKENS))[:, None])

    actor = ProbabilisticActor(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    critic = ValueOperator(values, in_keys=["observation"])
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=clip_range,
        clip_value=clip_range,
        entropy_bonus=False,
        loss_critic_type="l2",
        critic_coeff=1.0,
        reduction="none",
        functional=False,
    )
    batch = TensorDict(
        {
            "observation": index[:, None],
            "action": actions,
            "action_log_prob": old_logprobs,
            "state_value": old_values[:, None],
            "advantage": advantages[:, None],
            "value_target": returns[:, None],
        },
        batch_size=[TOKENS],
    )
    theirs = loss(batch)
    (theirs["loss_objective"].sum() + theirs["loss_critic"].sum()).backward()
    assert logits.rows.grad is not None and values.rows.grad is not None

    own_logits, own_values = (table.rows.detach().clone().requires_grad_() for table in (logits, values))
    policy = policy_loss(own_logits.log_softmax(-1)[index, actions], old_logprobs, advantages, clip_range)
    value = value_loss(own_values[:, 0], old_values, returns, clip_range)
    (policy.loss.sum() + value.loss.sum()).backward()

    assert 0.1 < float(policy.clipped.float().mean()) < 0.9  # both branches are there
    assert 0.1 < float(value.clipped.float().mean()) < 0.9
    torch.testing.assert_close(policy.loss, theirs["loss_objective"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * value.loss, theirs["loss_critic"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_logits.grad, logits.rows.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * own_values.grad, values.rows.grad, rtol=1e-5, atol=1e-6)  # type: ignore[operator]
