"""Losses over judged answers: of a reward model, and of a policy that learns from them without rollouts.

Every loss gives each answer a score. From ranked answers it gives each pair (better, worse) of answers to one prompt a
loss of the two scores. KTO also learns from single answers with a label, good or bad.

    loss          score of an answer y of T tokens        loss of a pair with scores w (better) and l (worse)
    reward model  the score head's                        -log sigmoid(w - l)
    dpo           beta log(pi(y) / pi_ref(y))             -(1 - e) log sigmoid(w - l) - e log sigmoid(l - w)
    ipo           beta log(pi(y) / pi_ref(y)) / T         ((w - l) / beta - 1 / (2 beta))^2
    simpo         beta log pi(y) / T                      -log sigmoid(w - l - gamma)
    kto           beta log(pi(y) / pi_ref(y))             lambda_D sigmoid(z - w) / 2 + lambda_U sigmoid(l - z) / 2

                                                          loss of a labelled answer with score s
    kto           beta log(pi(y) / pi_ref(y))             good: lambda_D sigmoid(z - s), bad: lambda_U sigmoid(s - z)

The reference policy pi_ref is the SFT model. All pairs of a prompt have the same weight, and so have all prompts of a
round. All
labelled answers have the same weight, since each is an example of the data: the paper's expectation is over those.

Sources: Ouyang et al. 2022, equation 1; Rafailov et al. 2023, equation 7; Mitchell 2023 (e, cDPO); Azar et al. 2023,
equation 17, with means over tokens as its authors use it; Meng et al. 2024, equation 6; Ethayarajh et al. 2024,
equation 8.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrlhf.algorithms.ranking import (
    Judged,
    JudgedPrompt,
    Measured,
    bradley_terry,
    flatten_pairs,
    ranking_accuracy,
    ranking_loss,
)
from rayrlhf.config_dpo import DPOConfig, DPOSection, IPOConfig, KTOConfig, SimPOConfig
from rayrlhf.data.comparisons import Answers, RankedAnswers
from rayrlhf.data.labelled import LabelledAnswers
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.batching import TokenBatch
from rayrlhf.models.forward import Forward


class PreferenceLoss(Protocol):
    """What the pass over judged answers, and the loop around it, ask of a loss."""

    def extra_rows(self, comparisons: Sequence[Answers]) -> list[Row]:
        """One further row for each comparison, whose log-probs the loss needs before each pass; or no rows at all."""

    def prepare(self, logprobs: NDArray[np.float64], references: NDArray[np.float64]) -> None:
        """Get ready for a pass over n comparisons. It is called only if the loss has extra rows.

        Args:
            logprobs: [n] log pi of these comparisons' extra rows under the policy as it is now, nats.
            references: [n] the same under the reference policy.
        """

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        """[n] score of each row of the batch, with gradient.

        Args:
            forward: the model in training.
            batch: n rows, each a prompt with an answer.
            reference: [n] log pi_ref(answer | prompt) in nats; None if the loss has no reference policy.
        """

    def judge(self, scores: Tensor, comparisons: Sequence[Any]) -> Judged:
        """The summed loss, and what its metrics are made of.

        Args:
            scores: [n] of all answers, those to one prompt behind those to the one before it.
            comparisons: in that order; of the kind that the loss learns from.
        """

    def details(self, measured: Measured) -> dict[str, float]:
        """Metrics of the pass that was made last, without the stage's name: `accuracy`, `margin`, and others."""


class PairLoss(PreferenceLoss):
    """A loss of pairs of ranked answers: one line of the upper table. A subclass has `scores` and `losses`."""

    @abstractmethod
    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        """[m] loss of each pair, from the [m] scores of its two answers."""

    def extra_rows(self, comparisons: Sequence[Answers]) -> list[Row]:
        return []

    def prepare(self, logprobs: NDArray[np.float64], references: NDArray[np.float64]) -> None:
        pass

    def judge(self, scores: Tensor, comparisons: Sequence[RankedAnswers]) -> Judged:
        # Pairs are indices into the answers of one prompt, and become indices into those of all of them.
        pairs = flatten_pairs(
            [c.pairs for c in comparisons], [len(c.response_ids) for c in comparisons], [c.weight for c in comparisons]
        )
        found = ranking_loss(scores, pairs.indices.to(scores.device), pairs.weights.to(scores.device), self.losses)
        sides = torch.stack([found.margins, found.better, found.worse]).cpu()
        return Judged(found.loss, [JudgedPrompt(*each) for each in sides.split([len(c.pairs) for c in comparisons], 1)])

    def details(self, measured: Measured) -> dict[str, float]:
        return {"accuracy": ranking_accuracy(measured.margins), "margin": float(measured.margins.mean())}


class RewardModelLoss(PairLoss):
    """-log of the probability of the ranking under the model of Bradley and Terry."""

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return forward.scores(batch)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        return bradley_terry(better, worse)


class PolicyPairLoss(PairLoss):
    """A loss whose scores are rewards that the policy implies."""

    def details(self, measured: Measured) -> dict[str, float]:
        common, chosen = super().details(measured), float(measured.better.mean())
        return {**common, "reward/chosen": chosen, "reward/rejected": chosen - common["margin"]}


class DPO(PolicyPairLoss):
    def __init__(self, config: DPOConfig) -> None:
        self.config = config

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * _log_ratios(forward, batch, reference)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        margins, e = better - worse, self.config.label_smoothing
        return -(1 - e) * logsigmoid(margins) - e * logsigmoid(-margins)


class IPO(PolicyPairLoss):
    def __init__(self, config: IPOConfig) -> None:
        self.config = config

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * _log_ratios(forward, batch, reference) / _tokens(batch)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        beta = self.config.beta
        return ((better - worse) / beta - 1 / (2 * beta)).square()


class SimPO(PolicyPairLoss):
    def __init__(self, config: SimPOConfig) -> None:
        self.config = config

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * answer_sums(forward, batch) / _tokens(batch)

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        return -logsigmoid(better - worse - self.config.target_margin)


class ZeroPoint(PreferenceLoss):
    """What both forms of KTO have: the loss of a good and of a bad answer, by their distance from the zero point.

    The zero point z is beta times the KL divergence of the policy from the reference, at least 0. It is measured on
    answers that belong to other prompts (see `mismatched`), over the prompts of a step on all ranks together, and has
    no gradient.
    """

    def __init__(self, config: KTOConfig) -> None:
        self.config = config
        self.kl = 0.0
        """Mean over the step's mismatched answers of log(pi / pi_ref), nats; `prepare` sets it before each pass."""

    @property
    def zero(self) -> float:
        """z, the score of an answer that is neither good nor bad."""
        return self.config.beta * max(self.kl, 0.0)

    def extra_rows(self, comparisons: Sequence[Answers]) -> list[Row]:
        return mismatched(comparisons)

    def prepare(self, logprobs: NDArray[np.float64], references: NDArray[np.float64]) -> None:
        self.kl = float((logprobs - references).mean())

    def scores(self, forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
        return self.config.beta * _log_ratios(forward, batch, reference)

    def good(self, scores: Tensor) -> Tensor:
        """The loss of each good answer."""
        return self.config.desirable_weight * torch.sigmoid(self.zero - scores)

    def bad(self, scores: Tensor) -> Tensor:
        """The loss of each bad answer."""
        return self.config.undesirable_weight * torch.sigmoid(scores - self.zero)


class KTO(ZeroPoint, PolicyPairLoss):
    """KTO over ranked answers: the better answer of a pair is a good one, the worse a bad one."""

    def losses(self, better: Tensor, worse: Tensor) -> Tensor:
        return (self.good(better) + self.bad(worse)) / 2  # the mean over the pair's two answers, each an example

    def details(self, measured: Measured) -> dict[str, float]:
        return {**super().details(measured), "kl": self.kl}


class LabelledKTO(ZeroPoint):
    """KTO over single answers with a label, each of which is an example.

    An answer's margin is by how much its score is on its own side of the zero point.
    """

    def judge(self, scores: Tensor, comparisons: Sequence[LabelledAnswers]) -> Judged:
        good = torch.tensor([label for c in comparisons for label in c.labels], device=scores.device)
        loss = torch.where(good, self.good(scores), self.bad(scores)).sum()
        margins = torch.where(good, scores - self.zero, self.zero - scores)
        counts = [len(c.labels) for c in comparisons]
        parts = zip(*(each.detach().cpu().split(counts) for each in (margins, scores, good)), strict=True)
        return Judged(loss, [JudgedPrompt(margin, own[label], own[~label]) for margin, own, label in parts])

    def details(self, measured: Measured) -> dict[str, float]:
        """As those of pairs, and `accuracy/chosen` and `accuracy/rejected`, of the sides that there are.

        `accuracy` is the mean of both sides' own. So it is 0.5 by chance also where most answers are good, of which a
        policy that raised all answers would be right about all. Where a side is missing, as it may be in a batch, the
        zero point stands for its mean in `margin`.
        """
        sides = {
            name: (float(scores.mean()), ranking_accuracy(sign * (scores - self.zero)))
            for name, scores, sign in (("chosen", measured.better, 1), ("rejected", measured.worse, -1))
            if len(scores)
        }
        rewards = {name: reward for name, (reward, _) in sides.items()}
        return {
            "accuracy": sum(accuracy for _, accuracy in sides.values()) / len(sides),
            "margin": rewards.get("chosen", self.zero) - rewards.get("rejected", self.zero),
            **{f"reward/{name}": reward for name, reward in rewards.items()},
            **{f"accuracy/{name}": accuracy for name, (_, accuracy) in sides.items()},
            "kl": self.kl,
        }


def make_preference_loss(config: DPOSection, labelled: bool = False) -> PreferenceLoss:
    """The loss that the section `dpo` names.

    Args:
        config: the section; one that `takes_labels` where answers are `labelled`.
        labelled: whether the data is `LabelledAnswers`, not `RankedAnswers`.
    """
    match config:
        case DPOConfig():
            return DPO(config)
        case IPOConfig():
            return IPO(config)
        case SimPOConfig():
            return SimPO(config)
        case KTOConfig():
            return LabelledKTO(config) if labelled else KTO(config)


def answer_sums(forward: Forward, batch: TokenBatch) -> Tensor:
    """[n] log pi(answer | prompt) in nats: the sum over the predicted tokens of each row."""
    return torch.stack([each.sum() for each in forward.logprobs(batch).split(batch.counts)])


def _log_ratios(forward: Forward, batch: TokenBatch, reference: Tensor | None) -> Tensor:
    assert reference is not None, "of the reference policy"
    return answer_sums(forward, batch) - reference


def _tokens(batch: TokenBatch) -> Tensor:
    """[n] predicted tokens of each row, at least 1."""
    return torch.tensor(batch.counts, dtype=torch.float32, device=batch.targets.device).clamp(min=1)


def mismatched(comparisons: Sequence[Answers]) -> list[Row]:
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
