"""The reward model's loss over ranked answers, and what is measured of it. Pure functions.

n answers of several prompts lie behind one another; a pair (better, worse) holds two of their indices.
The margin of a pair is score(better) - score(worse).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """[m] float32, 1 / number of pairs of the same prompt"""


class RankingLoss(NamedTuple):
    loss: Tensor
    """scalar, sum over prompts of the mean over each prompt's pairs of -log sigmoid(margin)"""
    margins: Tensor
    """[m], without gradient"""


class ConfidenceBin(NamedTuple):
    low: float
    high: float
    pairs: int
    accuracy: float
    """share of these pairs that are ordered rightly; NaN for an empty bin"""


def flatten_pairs(pairs: Sequence[Sequence[tuple[int, int]]], answers: Sequence[int]) -> Pairs:
    """Pairs of several prompts (indices into each prompt's own answers) as indices into all answers behind one another.

    Args:
        pairs: of each prompt, (better, worse).
        answers: how many answers each prompt has.
    """
    flat: list[tuple[int, int]] = []
    weights: list[float] = []
    start = 0
    for own, count in zip(pairs, answers, strict=True):
        flat += [(start + better, start + worse) for better, worse in own]
        weights += [1.0 / len(own) for _ in own]
        start += count
    return Pairs(torch.tensor(flat, dtype=torch.int64).reshape(-1, 2), torch.tensor(weights))


def ranking_loss(scores: Tensor, pairs: Tensor, weights: Tensor) -> RankingLoss:
    """-log sigmoid(r_better - r_worse), a prompt's pairs averaged so that a prompt counts once, summed over prompts.

    Divide by the number of prompts of the global batch (Ouyang et al. 2022, equation 1).

    Args:
        scores: [n] of all answers.
        pairs: [m, 2] (better, worse) indices into `scores`.
        weights: [m] from `flatten_pairs`.
    """
    margins = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    return RankingLoss(-(logsigmoid(margins) * weights).sum(), margins.detach())


def ranking_accuracy(margins: Tensor) -> float:
    """Share of the pairs ordered rightly; a tie counts half. NaN without pairs."""
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    return float(right.mean())


def accuracy_by_confidence(margins: Tensor, edges: Sequence[float] = CONFIDENCE_EDGES) -> list[ConfidenceBin]:
    """Accuracy of the pairs whose confidence sigmoid(|margin|) lies in [low, high); the last bin includes its end.

    A calibrated model is right about as often as it is confident.
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
