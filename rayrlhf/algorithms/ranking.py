"""The loss over ranked answers, what a loss finds, and the accuracy of scores. Pure functions.

The n answers to several prompts lie behind one another. A pair (better, worse) is two indices into them, and its margin
is score(better) - score(worse). Under the model of Bradley and Terry, sigmoid(margin) is the probability with which
the better answer is preferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MARGIN_EDGES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


class Pairs(NamedTuple):
    indices: Tensor
    """[m, 2] int64, (better, worse) into the concatenated answers"""
    weights: Tensor
    """[m] float32, weight of the prompt / number of its pairs, so that those of a prompt add up to its weight"""


class RankingLoss(NamedTuple):
    loss: Tensor
    """scalar: averaged over the pairs of each prompt and summed over prompts"""
    better: Tensor
    """[m] scores of the better answers, without gradient"""
    worse: Tensor
    """[m] scores of the worse answers, without gradient"""
    margins: Tensor
    """[m], without gradient"""


class JudgedPrompt(NamedTuple):
    """The scores of the answers to one prompt, on the CPU and without gradient."""

    margins: Tensor
    """[m] of its m pairs; or of its m labelled answers, by how much each score is on its own side"""
    better: Tensor
    """scores of the better answer of each pair; or of the good answers"""
    worse: Tensor
    """scores of the worse answer of each pair; or of the bad answers"""


class Judged(NamedTuple):
    """What a loss makes of the scores of a micro-batch."""

    loss: Tensor
    """scalar: summed over examples"""
    prompts: list[JudgedPrompt]
    """in the order in which their answers lie"""


class Measured(NamedTuple):
    """The result of a pass over judged answers, on all ranks together; CPU float32."""

    loss: float
    """mean over examples: prompts with ranked answers, or labelled answers"""
    margins: Tensor
    """[m] of all prompts, as `JudgedPrompt` has them"""
    better: Tensor
    worse: Tensor
    sources: list[str]
    """[m] where each margin comes from, as `Answers.source` has it"""


class ConfidenceBin(NamedTuple):
    """The pairs whose confidence, sigmoid(|margin|), lies between `low` and `high`."""

    low: float
    high: float
    pairs: int
    accuracy: float
    """share of these pairs whose order is right; NaN for an empty bin"""


def flatten_pairs(
    pairs: Sequence[Sequence[tuple[int, int]]], answers: Sequence[int], weights: Sequence[float] | None = None
) -> Pairs:
    """Turn pairs of each prompt's own answers into pairs of all answers behind one another.

    For example, `flatten_pairs([[(0, 1)], [(1, 0), (2, 0)]], [2, 3])` has the indices (0, 1), (3, 2), (4, 2) and the
    weights 1, 1/2, 1/2; with `weights` of 1 and 0.5 it has 1, 1/4, 1/4.

    Args:
        pairs: for each prompt its pairs (better, worse).
        answers: for each prompt the number of its answers.
        weights: for each prompt how much it counts; all 1 where None.
    """
    flat: list[tuple[int, int]] = []
    shared: list[float] = []
    start = 0
    for own, count, weight in zip(pairs, answers, weights or [1.0] * len(pairs), strict=True):
        flat += [(start + better, start + worse) for better, worse in own]
        shared += [weight / len(own) for _ in own]
        start += count
    return Pairs(torch.tensor(flat, dtype=torch.int64).reshape(-1, 2), torch.tensor(shared))


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """[m] -log sigmoid(margin), nats: the loss of Ouyang et al. 2022, equation 1, of each pair."""
    return -logsigmoid(better - worse)


def ranking_loss(
    scores: Tensor, pairs: Tensor, weights: Tensor, losses: Callable[[Tensor, Tensor], Tensor] = bradley_terry
) -> RankingLoss:
    """The loss of ranked answers before the mean over prompts.

    All pairs of a prompt are trained on together, each with weight 1 / number of pairs, so that a prompt counts once.
    The caller divides by the number of prompts in the batch of all ranks. Where prompts have weights of their own, as
    those of earlier rounds, a prompt counts by its weight, and the caller divides by their sum.

    Args:
        scores: [n] of all answers.
        pairs: [m, 2] (better, worse) indices into `scores`.
        weights: [m] from `flatten_pairs`.
        losses: [m] loss of each pair, from the scores of its better and its worse answer.
    """
    better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
    loss = (losses(better, worse) * weights).sum()
    return RankingLoss(loss, better.detach(), worse.detach(), (better - worse).detach())


def ranking_accuracy(margins: Tensor) -> float:
    """Share of the pairs whose better answer has the higher score; a tie counts half. NaN without pairs."""
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    return float(right.mean())


def accuracy_by_confidence(margins: Tensor, edges: Sequence[float] = CONFIDENCE_EDGES) -> list[ConfidenceBin]:
    """Accuracy by confidence, in bins [low, high) of which the last includes its end.

    In each bin, a calibrated model is right about as often as it is confident.

    Args:
        margins: [m].
        edges: of the bins, rising; confidence is at least 0.5.
    """
    confidence = torch.sigmoid(margins.double().abs())
    bins = []
    for low, high in pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == edges[-1]))
        bins.append(ConfidenceBin(low, high, int(inside.sum()), ranking_accuracy(margins[inside])))
    return bins


def margin_histogram(margins: Tensor, edges: Sequence[float] = MARGIN_EDGES) -> list[int]:
    """[len(edges) + 1] counts of margins below the first edge, in [edge, next edge), and from the last edge on."""
    places = torch.bucketize(margins.double(), torch.tensor(edges, dtype=torch.float64), right=True)
    return torch.bincount(places, minlength=len(edges) + 1).tolist()
