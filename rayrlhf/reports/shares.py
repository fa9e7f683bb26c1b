"""Intervals of shares, such as win rates, that stay between 0 and 1.

A bootstrap of twenty wins out of twenty has the interval [1, 1], and Student's t interval of shares leaves [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, ndtri

from rayrlhf.reports.intervals import t_interval, wins
from rayrlhf.resampling import CONFIDENCE, Array, Interval, wilson


def share(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval | None:
    """Mean of independent `values` [n] in [0, 1] with Wilson's score interval; None if none is measured (NaN).

    Values between 0 and 1, such as a tie that is half a win, spread less than those that are either: the interval is
    then wider than it need be.

    Source: Wilson 1927; Brown, Cai & DasGupta 2001, Interval Estimation for a Binomial Proportion.

    Raises:
        ValueError: a value outside [0, 1].
    """
    given = np.asarray(values, dtype=np.float64)
    measured = given[~np.isnan(given)]
    n = len(measured)
    if n == 0:
        return None
    if measured.min() < 0 or measured.max() > 1:
        raise ValueError("a share is a mean of values between 0 and 1")
    mean = float(measured.mean())
    return Interval(mean, *wilson(mean, n, ndtri((1 + confidence) / 2) ** 2), n)


def win_rate(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Interval | None:
    """Share of prompts on which a scores above b, a tie counting half; both [n]."""
    return share(wins(a, b), confidence)


def over_runs(means: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """As `intervals.over_runs`, of runs' shares."""
    mean, half = t_interval(np.asarray(means, dtype=np.float64), confidence)
    low, high = limits(mean, half)
    return Interval(float(mean), float(low), float(high), len(means))


def limits(means: Array, halves: Array) -> tuple[Array, Array]:
    """The limits of shares' intervals that would have these half-widths if shares were not limited.

    expit(logit(m) ± half / (m (1 - m))): to first order the same interval, symmetric on the scale of log-odds. That of
    0 or 1 is the share itself, since all that went into it are alike.

    Source: Agresti 2013, Categorical Data Analysis, section 3.1 (the delta method for a logit).
    """
    means = np.clip(means, 0, 1)
    inside = (means > 0) & (means < 1)
    m = np.where(inside, means, 0.5)
    low, high = (expit(logit(m) + sign * halves / (m * (1 - m))) for sign in (-1, 1))
    return np.where(inside, low, means), np.where(inside, high, means)
