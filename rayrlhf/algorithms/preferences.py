"""Losses over ranked answers: of a reward model, and of a policy that learns from them without rollouts.

Every loss gives each answer a score, and each pair (better, worse) of answers to one prompt a loss of the two scores.

    loss          score of an answer y of T tokens        loss of a pair with scores w (better) and l (worse)
    reward model  the score head's                        -log sigmoid(w - l)
    dpo           beta log(pi(y) / pi_ref(y))             -(1 - e) log sigmoid(w - l) - e log sigmoid(l - w)
    ipo           beta log(pi(y) / pi_ref(y)) / T         ((w - l) / beta - 1 / (2 beta))^2
    simpo         beta log pi(y) / T                      -log sigmoid(w - l - gamma)
    kto           beta log(pi(y) / pi_ref(y))             lambda_D sigmoid(z - w) / 2 + lambda_U sigmoid(l - z) / 2

The reference policy pi_ref is the SFT model. All pairs of a prompt have the same weight, and so have all prompts.

Sources: Ouyang et al. 2022, equation 1; Rafailov et al. 2023, equation 7; Mitchell 2023 (e, cDPO); Azar et al. 2023,
equation 17, with means over tokens as its authors use it; Meng et al. 2024, equation 6; Ethayarajh et al. 2024,
equation 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrlhf.algorithms.ranking import bradley_terry
from rayrlhf.config_dpo import DPOConfig, IPOConfig, KTOConfig, SimPOConfig
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.batching import TokenBatch
from rayrlhf.models.forward import Forward


class PairLoss(Protocol):
    """One line of the table above."""

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        """[n] score of each row of the batch, with gradient.

        Args:
            forward: the model in training.
            batch: n rows, each a prompt with an answer.
            reference: [n] log pi_ref(answer | prompt) in nats; None if the loss has no reference policy.
        """

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        """[m] loss of each pair, from the [m] scores of its two answers."""


class RewardModelLoss:
    """-log of the probability of the ranking under the model of Bradley and Terry."""

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return forward.scores(batch)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        return bradley_terry(better, worse)


class DPO:
    def __init__(self, config: DPOConfig) -> None:
        self.config = config

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * _log_ratios(forward, batch, reference)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        margins, e = better - worse, self.config.label_smoothing
        return -(1 - e) * logsigmoid(margins) - e * logsigmoid(-margins)


class IPO:
    def __init__(self, config: IPOConfig) -> None:
        self.config = config

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * _log_ratios(forward, batch, reference) / _tokens(batch)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        beta = self.config.beta
        return ((better - worse) / beta - 1 / (2 * beta)).square()


class SimPO:
    def __init__(self, config: SimPOConfig) -> None:
        self.config = config

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * answer_sums(forward, batch) / _tokens(batch)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        return -logsigmoid(better - worse - self.config.target_margin)


class KTO:
    """The zero point z is beta times the KL divergence of the policy from the reference, at least 0.

    It is measured on answers that belong to other prompts (see `mismatched`), over the prompts of a step on all ranks
    together, and has no gradient.
    """

    def __init__(self, config: KTOConfig) -> None:
        self.config = config
        self.kl = 0.0
        """Mean over the step's mismatched answers of log(pi / pi_ref), nats; set before each pass."""

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * _log_ratios(forward, batch, reference)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        zero = self.config.beta * max(self.kl, 0.0)
        good = self.config.desirable_weight * torch.sigmoid(zero - better)
        bad = self.config.undesirable_weight * torch.sigmoid(worse - zero)
        return (good + bad) / 2  # the mean over the pair's two answers, each an example of its own


def make_preference_loss(config: DPOConfig | IPOConfig | SimPOConfig | KTOConfig) -> PairLoss:
    """The loss that the section `dpo` names."""
    match config:
        case DPOConfig():
            return DPO(config)
        case IPOConfig():
            return IPO(config)
        case SimPOConfig():
            return SimPO(config)
        case KTOConfig():
            return KTO(config)


def answer_sums(forward: Forward, batch: TokenBatch) -> Tensor:
    """[n] log pi(answer | prompt) in nats: the sum over the predicted tokens of each row."""
    return torch.stack([each.sum() for each in forward.logprobs(batch).split(batch.counts)])


def _log_ratios(forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
    assert reference is not None, "of the reference policy"
    return answer_sums(forward, batch) - reference


def _tokens(batch: TokenBatch) -> Tensor:
    """[n] predicted tokens of each row, at least 1."""
    return torch.tensor(batch.counts, dtype=torch.float32, device=batch.targets.device).clamp(min=1)


def mismatched(comparisons: Sequence[RankedAnswers]) -> list[Row]:
    """For each comparison a row of its prompt and an answer to another prompt, from which KTO estimates its KL.

    The other prompt is the nearest one before it in the list, which begins again at its end. Which of that prompt's
    answers it is changes from one comparison to the next, so that good and bad answers are drawn alike.

    The rows do not depend on batches. So their reference log-probs are computed once, and a batch of one prompt, for
    which no other prompt's answer would be in the batch, needs no exception.

    Raises:
        UserError: all prompts are the same.
    """
    rows = []
    for i, own in enumerate(comparisons):
        around = (comparisons[i - distance] for distance in range(1, len(comparisons)))
        other = next((c for c in around if c.prompt_ids != own.prompt_ids), None)
        if other is None:
            raise UserError(
                "dpo: loss kto needs two different prompts at least; give more comparisons, or take loss dpo"
            )
        rows.append(Row.completion(own.prompt_ids, other.response_ids[i % len(other.response_ids)]))
    return rows
