"""Statistics of evaluations: bootstrap intervals, paired tests, and win rates between answers of equal length.

All are pure functions of arrays with one entry for each prompt ([n]); two arrays belong to the same prompts in the same
order. A NaN entry means that the measure is missing for this prompt: the prompt is left out, and an interval's `n`
counts the others. A result of None means that no prompt remains. An infinite entry is the caller's error: ValueError.
Equal `seed` and n give equal resamples, so that all measures of the same prompts are resampled alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, ndtri, stdtrit

from rayrlhf.resampling import CONFIDENCE, Array, Interval

PERMUTATIONS = 9999
RIDGE = 0.01
"""Precision of the normal prior (mean 0) on both coefficients of the length-controlled win rate: a standard deviation
of 10 on the logit scale. It matters only where wins and losses separate, and keeps those fits finite."""
_BLOCK = 500_000
"""Resampled values held at once: bounds memory, and fits a cache."""


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference, and the two-sided p-value of the hypothesis that there is none."""

    p: float


def bootstrap(values: ArrayLike, samples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE) -> Interval | None:
    """Mean of `values` [n] with a percentile-bootstrap interval over prompts.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.

    Raises:
        ValueError: an infinite value, or not one dimension.
    """
    return _resampled(lambda drawn: drawn.mean(axis=1), [values], samples, seed, confidence)


def paired_difference(
    a: ArrayLike, b: ArrayLike, samples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE
) -> Difference | None:
    """Mean of a - b with its interval and p-value, resampling prompts, not answers: both [n].

    The p-value is that of the sign-flip permutation test: without a difference, a - b would be as likely as b - a on
    each prompt. It is exact for few prompts; for more it has `PERMUTATIONS` random flips and is never below 0.0001.
    """
    left, right = _same_prompts(a, b)
    interval = bootstrap(left - right, samples, seed, confidence)
    return None if interval is None else Difference(**asdict(interval), p=sign_flip_p(left - right, seed))


def sign_flip_p(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p-value of the mean of `differences` [n, at least one measured] under random signs.

    Source: Fisher's randomisation test of matched pairs (The Design of Experiments, 1935, section 21).
    """
    measured = np.asarray(differences, dtype=np.float64)
    measured = measured[~np.isnan(measured)]
    if len(measured) == 1:
        return 1.0  # both signs are as far from 0; scipy wants two observations
    from scipy.stats import permutation_test  # takes a second to import, and most processes never test anything

    return float(
        permutation_test(
            (measured,),
            lambda x, axis: np.abs(x.mean(axis=axis)),
            permutation_type="samples",
            alternative="greater",  # of the absolute mean: two-sided
            vectorized=True,
            n_resamples=PERMUTATIONS,
            batch=max(1, _BLOCK // len(measured)),
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def jackknife(value: float, left_out: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """A share of n answers together, such as `distinct_2`, with its jackknife interval, cut to [0, 1].

    A bootstrap would not do: it draws an answer twice, which then repeats itself.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 11.

    Args:
        value: of all answers.
        left_out: [n] the same without each one in turn, n of at least 2.
        confidence: of the interval.
    """
    others = np.asarray(left_out, dtype=np.float64)
    error = np.sqrt((len(others) - 1) * others.var())
    half = float(ndtri((1 + confidence) / 2) * error)
    return Interval(float(value), max(0.0, value - half), min(1.0, value + half), len(others))


def length_controlled_win_rate(
    a: ArrayLike,
    b: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """The win rate of a over b that is expected of answers of equal length; all [n], lengths in tokens.

    A logistic regression of the win (a tie is half a win) on an intercept and tanh(d / std(d)), d the difference of
    lengths; the prediction at d = 0. None where d is one and the same number other than 0: nothing is known of equal
    lengths then. Where a is nearly always the longer one the prediction is an extrapolation, and its interval wide.

    Source: Dubois et al. 2024, Length-Controlled AlpacaEval, eq. 2, without the difficulty of single prompts, which
    takes many models to estimate. `RIDGE` keeps separable data finite.
    """
    won, difference = wins(a, b), np.subtract(*_same_prompts(lengths_a, lengths_b))
    scale = _scale(won, difference)
    if scale is None:
        return None
    return _resampled(_win_rate_at_zero, [won, np.tanh(difference / scale)], samples, seed, confidence)


def length_controlled_difference(
    a: ArrayLike,
    b: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """The mean of a - b that is expected of answers of equal length; all [n].

    The intercept of a least-squares line of a - b over the difference of lengths. None as for the win rate.
    """
    values, lengths = np.subtract(*_same_prompts(a, b)), np.subtract(*_same_prompts(lengths_a, lengths_b))
    if _scale(values, lengths) is None:
        return None

    def intercept(y: Array, x: Array) -> Array:
        return _intercept(y.mean(axis=1), x.mean(axis=1), (x * y).mean(axis=1), (x * x).mean(axis=1))

    return _resampled(intercept, [values, lengths], samples, seed, confidence)


def pooled(
    values: ArrayLike,
    lengths: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Mean over runs and prompts of `values` [runs, n] (paired differences, say), resampling both.

    The runs share their prompts, so that a resample draws runs, and then one set of prompts for all of them: what is
    hard in a prompt is hard in every run, and drawing prompts for each run apart would make the interval too narrow.
    With one run it is the bootstrap over prompts. With two or three runs, the spread between runs is under-estimated,
    as in any bootstrap of so few. Prompts that some run has not measured are left out; `n` counts the others.

    With `lengths` [runs, n], differences of lengths, it is the value at equal length, as in
    `length_controlled_difference`.

    Source: Owen 2007, The pigeonhole bootstrap.
    """
    y = np.asarray(values, dtype=np.float64)
    x = np.zeros_like(y) if lengths is None else np.asarray(lengths, dtype=np.float64)
    measured = ~np.isnan(y + x).any(axis=0)
    y, x = y[:, measured], x[:, measured]
    runs, n = y.shape
    if n == 0 or _scale(y, x) is None:
        return None
    rng = np.random.default_rng(seed)

    def shares(count: int) -> Array:
        """[1 + samples, count]: how much each counts in the data itself, then in each resample."""
        even = np.full(count, 1 / count)
        return np.vstack([even, rng.multinomial(count, even, samples) / count])

    of_runs, of_prompts = shares(runs), shares(n)
    drawn = _intercept(*(((of_runs @ grid) * of_prompts).sum(axis=1) for grid in (y, x, x * y, x * x)))
    return _interval(float(drawn[0]), drawn[1:], n, confidence)


def over_runs(means: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean over two or more runs with Student's t interval: what to expect of another seed on the same prompts."""
    mean, half = t_interval(np.asarray(means, dtype=np.float64), confidence)
    return Interval(float(mean), float(mean - half), float(mean + half), len(means))


def t_interval(values: Array, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """Mean and half-width of Student's t interval over the first axis of `values` [runs >= 2, ...]."""
    runs = len(values)
    quantile = stdtrit(runs - 1, (1 + confidence) / 2)
    return values.mean(axis=0), quantile * values.std(axis=0, ddof=1) / np.sqrt(runs)


def wins(a: ArrayLike, b: ArrayLike) -> Array:
    """[n] 1 where a is above b, 0.5 where they are equal, 0 where it is below; NaN where either is."""
    left, right = _same_prompts(a, b)
    return (np.sign(left - right) + 1) / 2


def p_text(p: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _resampled(
    statistic: Callable[..., Array], columns: Sequence[ArrayLike], samples: int, seed: int, confidence: float
) -> Interval | None:
    """`statistic` maps one array [resamples, n] a column to [resamples]."""
    given = np.stack([np.asarray(column, dtype=np.float64) for column in columns])
    if given.ndim != 2 or np.isinf(given).any():
        raise ValueError("bootstrap needs finite values (or NaN for not measured) in one dimension")
    measured = given[:, ~np.isnan(given).any(axis=0)]
    n = measured.shape[1]
    if n == 0:
        return None
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    sizes = [min(block, samples - start) for start in range(0, samples, block)]
    drawn = np.concatenate([statistic(*measured[:, rng.integers(0, n, (size, n))]) for size in sizes])
    estimate = statistic(*measured[:, None, :])[0]
    return _interval(float(estimate), drawn, n, confidence)


def _interval(estimate: float, drawn: Array, n: int, confidence: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high), n)


def _win_rate_at_zero(wins: Array, x: Array) -> Array:
    """Ridge-penalised logistic regressions of `wins` on 1 and `x` (in [-1, 1]), [resamples, n]; predictions at x = 0.

    Newton's method, damped by log(1 + d) / d with d = sqrt(2) |step|, which converges from anywhere because the rows
    (1, x) are no longer than sqrt(2) (Sun & Tran-Dinh 2019, Generalized self-concordant functions, theorem 2).
    """
    intercept, slope = np.zeros(len(wins)), np.zeros(len(wins))
    for _ in range(200):
        p = expit(intercept[:, None] + slope[:, None] * x)
        residual, weight = wins - p, p * (1 - p)
        weighted = weight * x
        g0, g1 = residual.sum(axis=1) - RIDGE * intercept, (residual * x).sum(axis=1) - RIDGE * slope
        h00, h01, h11 = weight.sum(axis=1) + RIDGE, weighted.sum(axis=1), (weighted * x).sum(axis=1) + RIDGE
        determinant = h00 * h11 - h01 * h01
        s0, s1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        d = np.sqrt(2 * (s0 * s0 + s1 * s1)) + 1e-300
        damping = np.log1p(d) / d
        intercept, slope = intercept + damping * s0, slope + damping * s1
        if d.max() < 1e-8:
            break
    return expit(intercept)


def _intercept(y: Array, x: Array, xy: Array, xx: Array) -> Array:
    """Of least-squares lines, from means; the mean of y itself where x does not vary."""
    variance = xx - x * x
    varies = variance > 1e-9 * xx
    return y - np.where(varies, (xy - x * y) / np.where(varies, variance, 1), 0) * x


def _scale(values: Array, lengths: Array) -> float | None:
    """The standard deviation of `lengths` where both are measured; None if they are one number other than 0."""
    measured = lengths[~np.isnan(values + lengths)]
    if len(measured) == 0 or not measured.any():
        return 1.0
    return None if np.ptp(measured) == 0 else float(measured.std())


def _same_prompts(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a pair needs the same prompts: shapes {left.shape} and {right.shape}")
    return left, right
