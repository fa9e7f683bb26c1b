"""One score for each answer from the rankings of several people, and how reliable each of them is.

`majority` gives an answer the number of others that more rankings have it before than behind, a tie counting half. It
asks nothing of the labellers, and every one has the same vote (Copeland 1951).

`bradley_terry` fits a score to each answer, where a ranking of a more reliable labeller weighs more. Of labellers who
disagree it follows the one whom the others confirm elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from rayrlhf.labelling.agreement import signs
from rayrlhf.labelling.judgements import Judgement
from rayrlhf.resampling import Array

RIGHT, WRONG = 8.0, 2.0
"""What is believed of a labeller before anything is known: as after so many right and wrong verdicts on pairs."""
PRECISION = 1.0
"""Of the normal prior of an answer's score, whose mean is 0: it keeps scores finite where all labellers agree."""
SAME = 1e-4
"""Scores that are no farther apart are equal: the fit stops at about a hundredth of that."""


@dataclass(frozen=True)
class Aggregated:
    """What all labellers together say."""

    scores: Mapping[str, tuple[float, ...]]
    """By item [K], higher is better, equal scores are a tie, NaN is unknown. An item that everybody skipped is not
    there."""
    reliability: Mapping[str, float]
    """By labeller: the estimated share of right verdicts, of the pairs that they order."""


def aggregate(judgements: Sequence[Judgement], method: str) -> Aggregated:
    """One ranking of each item, of which there are judgements.

    Repeats do not count, as nobody has two votes, nor do skipped items.

    Args:
        judgements: one a labeller, item and repeat.
        method: a key of `METHODS`.
    """
    rankings = [judgement for judgement in judgements if judgement.ranks is not None and judgement.repeat == 0]
    # Sums of numbers depend on their order in the last digit, and labellers finish in any order.
    rankings.sort(key=lambda judgement: (judgement.item, judgement.labeller))
    reliability = reliabilities(rankings)
    by_item: dict[str, list[Judgement]] = {}
    for ranking in rankings:
        by_item.setdefault(ranking.item, []).append(ranking)
    scores = {}
    for item, own in by_item.items():
        weights = np.array([reliability[ranking.labeller] for ranking in own])
        scores[item] = METHODS[method](np.array([ranking.ranks for ranking in own]), weights)
    return Aggregated(scores, reliability)


def majority(rankings: NDArray[np.int64], reliability: Array) -> tuple[float, ...]:
    """[K] number of other answers that each one beats in most of the rankings [labellers, K]; a tie is half a win."""
    votes = np.sign(rankings[:, None, :] - rankings[:, :, None]).sum(axis=0)  # [i, j]: for i minus for j
    return tuple(((np.sign(votes) + 1) / 2).sum(axis=1) - 0.5)  # each ties with itself


def bradley_terry(rankings: NDArray[np.int64], reliability: Array) -> tuple[float, ...]:
    """[K] the most probable scores of the Bradley-Terry model of rankings [labellers, K].

    The probability that answer i is called better than j is the logistic function of the difference of their scores,
    and a tie is half a verdict for either. A labeller's log-likelihood is multiplied by the log odds of being right,
    which is the best weight of independent votes (Nitzan & Paroush 1982), in units of that of a labeller of whom
    nothing is known. Below one half it is 0: a labeller who is wrong more often than not has no vote. Where nobody has
    one, the scores are NaN: nothing is known, which is something else than a tie.

    Source: Bradley & Terry 1952.
    """
    first, second = np.triu_indices(rankings.shape[1], 1)
    wins = np.stack([(signs(ranking) + 1) / 2 for ranking in rankings])  # [labellers, pairs]
    weights = np.maximum(logit(reliability), 0)[:, None] / logit(RIGHT / (RIGHT + WRONG))

    if not weights.any():
        return (math.nan,) * rankings.shape[1]

    def loss(scores: Array) -> tuple[float, Array]:
        """With its gradient."""
        gap = scores[first] - scores[second]
        slope = (weights * (expit(gap) - wins)).sum(axis=0)
        gradient = np.bincount(first, slope, len(scores)) - np.bincount(second, slope, len(scores))
        value = (weights * (np.logaddexp(0, gap) - wins * gap)).sum() + PRECISION / 2 * scores @ scores
        return float(value), gradient + PRECISION * scores

    start = np.zeros(rankings.shape[1])
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": SAME / 100}).x
    return _with_ties(found)


METHODS: dict[str, Callable[[NDArray[np.int64], Array], tuple[float, ...]]] = {
    "majority": majority,
    "bradley_terry": bradley_terry,
}
"""By the value of `collect.labeller.aggregate`."""


def reliabilities(rankings: Sequence[Judgement], rounds: int = 100) -> dict[str, float]:
    """By labeller: the share of right verdicts, of the pairs that they order, where nobody knows which are right.

    Which answer of a pair is better is as probable as the verdicts on it say, each weighed by its labeller's share; a
    labeller's share is that of the verdicts which are right by these probabilities. Both are repeated in turn until
    they agree: the EM algorithm of the model in which labellers err independently. A labeller whom nobody else
    confirms or contradicts stays at what is believed before, `RIGHT / (RIGHT + WRONG)`.

    Source: Dawid & Skene 1979, with one share for each labeller.
    """
    names = sorted({ranking.labeller for ranking in rankings})
    pairs: dict[tuple[str, int], int] = {}
    rows = [
        (pairs.setdefault((ranking.item, pair), len(pairs)), names.index(ranking.labeller), sign)
        for ranking in rankings
        if ranking.ranks is not None
        for pair, sign in enumerate(signs(ranking.ranks))
        if sign
    ]
    share = np.full(len(names), RIGHT / (RIGHT + WRONG))
    if not rows:
        return dict(zip(names, share.tolist(), strict=True))
    pair, labeller, sign = (
        np.array([r[0] for r in rows]),
        np.array([r[1] for r in rows]),
        np.array([r[2] for r in rows]),
    )
    given = np.bincount(labeller, minlength=len(names))
    for _ in range(rounds):
        for_first = expit(np.bincount(pair, sign * logit(share)[labeller]))[pair]
        right = np.bincount(labeller, np.where(sign > 0, for_first, 1 - for_first), len(names))
        share = (right + RIGHT) / (given + RIGHT + WRONG)
    return dict(zip(names, share.tolist(), strict=True))


def _with_ties(scores: Array) -> tuple[float, ...]:
    """Scores that are the same up to the accuracy of the fit become the same."""
    order = np.argsort(scores)
    group = np.concatenate([[0], np.cumsum(np.diff(scores[order]) > SAME)])
    means = np.bincount(group, scores[order]) / np.bincount(group)
    same = np.empty_like(scores)
    same[order] = means[group]
    return tuple(same.tolist())
