"""GAE, the clipped losses and the advantages of a group against torchrl.

torchrl's functional estimators take [B, T, 1] tensors with the next state's value and `done` flags. Rows of R tokens
become T = R steps with `done` at the last token; the padding behind it is further steps of zeros, which cannot reach
back over a `done`. It keeps the discount in float32, hence the tolerance.

Its `ClipPPOLoss` wants modules: the actor here is a table of logits and the critic a table of values, so that its
log-probs, ratios and gradients are those of the tokens we hand to our own losses. Its value loss is (V - R)^2 without
the half, and it clips log ratios where we clip ratios: the same bounds. Its losses for language models take such a
table too, with rows of tokens that are padded on the left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.modules.distributions import LLMMaskedCategorical
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.llm import DAPO, CISPOLoss, GRPOLoss, MCAdvantage
from torchrl.objectives.value.functional import generalized_advantage_estimate, vec_generalized_advantage_estimate

from rayrlhf.algorithms.advantages import generalized_advantages
from rayrlhf.algorithms.experience import Groups, Sampled
from rayrlhf.algorithms.grpo import GRPO
from rayrlhf.algorithms.losses import clipped_surrogate, clipped_weight, value_loss
from rayrlhf.algorithms.trainer import MiniBatch
from rayrlhf.config_rl import GRPOConfig
from tests.tiny import tiny_models, trainer_of

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
    policy = clipped_surrogate(own_logits.log_softmax(-1)[index, actions], old_logprobs, advantages, clip_range)
    value = value_loss(own_values[:, 0], old_values, returns, clip_range)
    (policy.loss.sum() + value.loss.sum()).backward()

    assert 0.1 < float(policy.clipped.float().mean()) < 0.9  # both branches are there
    assert 0.1 < float(value.clipped.float().mean()) < 0.9
    torch.testing.assert_close(policy.loss, theirs["loss_objective"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * value.loss, theirs["loss_critic"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_logits.grad, logits.rows.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * own_values.grad, values.rows.grad, rtol=1e-5, atol=1e-6)  # type: ignore[operator]


class TableActor(Table):
    """[B, T, vocabulary] logits as torchrl's losses for language models want them: as a masked distribution."""

    def __init__(self, rows: Tensor, mask: Tensor) -> None:
        super().__init__(rows)
        self.mask = mask

    def get_dist(self, tensordict: TensorDict, logits_key: str) -> LLMMaskedCategorical:
        return LLMMaskedCategorical(self.rows, self.mask)


class Responses(NamedTuple):
    """Ragged responses, padded on the left as torchrl has them."""

    mask: Tensor
    """[B, T]"""
    tokens: Tensor
    """[B, T]"""
    old_logprobs: Tensor
    """[B, T]"""
    advantages: Tensor
    """[B, T]"""
    logits: Tensor
    """[B, T, vocabulary], moved away from those of the old log-probs"""

    def theirs(self, loss: type[GRPOLoss], **settings: Any) -> tuple[TableActor, GRPOLoss, TensorDict]:
        batch = TensorDict(
            tokens=TensorDict(full=self.tokens),
            log_probs=TensorDict(full=self.old_logprobs),
            advantage=self.advantages[..., None],
        )
        actor = TableActor(self.logits, self.mask)
        return actor, loss(actor, entropy_bonus=False, **settings), batch

    def ours(self) -> tuple[Tensor, Tensor]:
        """The table, and the [N] log-probs of the tokens in it."""
        table = self.logits.clone().requires_grad_()
        return table, table.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0][self.mask]


@pytest.fixture
def responses() -> Responses:
    torch.manual_seed(0)
    longest = int(LENGTHS.max())
    mask = torch.arange(longest) >= longest - LENGTHS[:, None]
    tokens = torch.randint(VOCABULARY, mask.shape)
    old_logits = torch.randn(*mask.shape, VOCABULARY)
    old_logprobs = old_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    advantages = torch.randn(len(LENGTHS), 1).expand(mask.shape)
    return Responses(mask, tokens, old_logprobs, advantages, old_logits + 0.3 * torch.randn(old_logits.shape))


@pytest.mark.parametrize(("aggregation", "loss_mean"), [("token_mean", "token"), ("prompt_mean", "response")])
@pytest.mark.parametrize(("loss", "limits"), [(GRPOLoss, (0.2, 0.2)), (DAPO, (0.2, 0.28))])
def test_losses_over_responses(
    responses: Responses, loss: type[GRPOLoss], limits: tuple[float, float], aggregation: str, loss_mean: Any
) -> None:
    actor, theirs, batch = responses.theirs(loss, clip_epsilon=limits, aggregation=aggregation)
    other = theirs(batch).loss_objective
    other.sum().backward()

    table, logprobs = responses.ours()
    mask = responses.mask
    found = clipped_surrogate(logprobs, responses.old_logprobs[mask], responses.advantages[mask], *limits)
    assert 0.1 < float(found.clipped.float().mean()) < 0.9
    trainer = trainer_of(tiny_models()[0], None, GRPOConfig(loss_mean=loss_mean))
    total, count = trainer._total(found.loss, LENGTHS.tolist(), MiniBatch(int(LENGTHS.sum()), len(LENGTHS)))
    (total / count).backward()
    torch.testing.assert_close(total / count, other.squeeze(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.grad, actor.rows.grad, rtol=1e-5, atol=1e-6)


def test_torchrls_cispo_has_no_gradient_where_it_clips(responses: Responses) -> None:
    """It differentiates the clipped ratio, where equation 4 of MiniMax 2025 stops its gradient and keeps log pi's.

    Within the limits the two gradients are the same; beyond them only ours has any, which is CISPO's point.
    """
    limits = 0.5, 0.2
    actor, theirs, batch = responses.theirs(CISPOLoss, clip_epsilon=limits)
    theirs(batch).loss_objective.sum().backward()

    table, logprobs = responses.ours()
    mask = responses.mask
    found = clipped_weight(logprobs, responses.old_logprobs[mask], responses.advantages[mask], *limits)
    found.loss.mean().backward()
    assert 0.1 < float(found.clipped.float().mean()) < 0.9
    assert table.grad is not None and actor.rows.grad is not None
    own, other = table.grad[mask], actor.rows.grad[mask]
    torch.testing.assert_close(own[~found.clipped], other[~found.clipped], rtol=1e-5, atol=1e-6)
    assert not other[found.clipped].any()
    assert own[found.clipped].abs().amax(1).min() > 1e-4


def test_grpo_advantages() -> None:
    """A reward for each response at its last token; torchrl wants all of a group before it says anything."""
    torch.manual_seed(0)
    group, prompts = 4, [0, 1, 2] * 4
    scores = torch.randn(len(prompts)) * torch.tensor([1.0, 10.0, 100.0]).repeat(4)
    transform = MCAdvantage(group, prompt_key="group", trajectory_return="sum")
    done = []
    for length, prompt, score in zip(range(1, 13), prompts, scores, strict=True):
        last = torch.arange(length)[:, None] == length - 1
        outcome = TensorDict(reward=score * last, done=last, batch_size=[length])
        trajectory = TensorDict(group=torch.full((length,), prompt), next=outcome, batch_size=[length])
        done.append(transform.inv(trajectory))
    theirs = torch.cat([each["advantage"].flatten() for each in done if each is not None])

    mask = torch.arange(12) < torch.arange(1, 13)[:, None]
    zeros = torch.zeros(mask.shape)
    sampled = Sampled(scores, mask[:, 0], mask, zeros, None, zeros, zeros, zeros.sum())
    groups = Groups.of([str(prompt) for prompt in prompts], range(len(prompts)), "cpu", lambda t: t)
    found, _ = GRPO(GRPOConfig()).advantages(sampled, scores, groups, 0.0, lambda t: t)
    by_group = [found[i][mask[i]] for prompt in range(3) for i in range(prompt, len(prompts), 3)]
    torch.testing.assert_close(torch.cat(by_group), theirs, rtol=1e-5, atol=1e-6)
