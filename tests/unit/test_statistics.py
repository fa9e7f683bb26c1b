"""Intervals against scipy and known coverage, p-values against enumeration, fits against a minimiser."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from rayrlhf.reports import intervals as statistics
from rayrlhf.reports.intervals import (
    PERMUTATIONS,
    RIDGE,
    bootstrap,
    length_controlled_difference,
    length_controlled_win_rate,
    over_runs,
    paired_difference,
    pooled,
    sign_flip_p,
)
from rayrlhf.reports.shares import limits, share, win_rate
from rayrlhf.reports.shares import over_runs as shares_over_runs
from rayrlhf.resampling import Array, Interval


@pytest.mark.parametrize(("n", "confidence"), [(200, 0.95), (37, 0.8)])
def test_bootstrap_equals_scipy(n: int, confidence: float) -> None:
    values = np.random.default_rng(1).exponential(size=n)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=confidence, method="percentile", random_state=7
    ).confidence_interval
    got = bootstrap(values, 2000, seed=7, confidence=confidence)
    assert got is not None
    assert got.mean == pytest.approx(values.mean())
    # Independent resamples: the quantiles agree up to Monte-Carlo noise, a small share of the interval's width.
    width = expected.high - expected.low
    assert got.low == pytest.approx(expected.low, abs=0.08 * width)
    assert got.high == pytest.approx(expected.high, abs=0.08 * width)
    assert got.n == n


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        got = bootstrap(rng.normal(3.0, 2.0, size=60), 400, seed=trial)
        assert got is not None
        hits += got.low <= 3.0 <= got.high
    assert 0.90 <= hits / 400 <= 0.98


def test_bootstrap_does_not_depend_on_its_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    whole = bootstrap(values, 301, seed=5)
    monkeypatch.setattr(statistics, "_BLOCK", 50 * 7)
    assert bootstrap(values, 301, seed=5) == whole


def test_bootstrap_of_degenerate_input() -> None:
    one = bootstrap([2.5], 100, 0)
    assert one == Interval(2.5, 2.5, 2.5, 1)
    assert bootstrap([np.nan, np.nan], 100, 0) is None
    assert bootstrap([], 100, 0) is None
    some = bootstrap([1.0, np.nan, 3.0], 100, 0)
    assert some == bootstrap([1.0, 3.0], 100, 0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, np.inf], 100, 0)
    with pytest.raises(ValueError, match="one dimension"):
        bootstrap([[1.0, 2.0]], 100, 0)


def test_pairing_removes_what_the_prompts_have_in_common() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 10, size=300)
    a, b = difficulty + 0.5 + rng.normal(0, 0.1, 300), difficulty + rng.normal(0, 0.1, 300)
    got = paired_difference(a, b, 1000, 0)
    assert got is not None
    assert got.mean == pytest.approx((a - b).mean())
    assert got.p == 1 / (PERMUTATIONS + 1)  # the smallest there is
    half = 1.96 * (a - b).std(ddof=1) / np.sqrt(300)  # normal theory
    assert got.high - got.low == pytest.approx(2 * half, rel=0.15)
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(a, b[:-1])


def test_win_rate_counts_ties_half_and_skips_the_unmeasured() -> None:
    got = win_rate([1.0, 2.0, 3.0, np.nan, 0.0], [0.0, 2.0, 4.0, 1.0, -1.0])
    assert got is not None
    assert got.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert got.n == 4
    assert 0.0 <= got.low < got.mean < got.high <= 1.0
    certain = win_rate(np.ones(20), np.zeros(20))
    assert certain is not None and (certain.mean, certain.high) == (1.0, 1.0)
    assert certain.low == pytest.approx(20 / (20 + 1.959964**2))  # and not 1: twenty wins are no proof


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 17), (60, 60), (499, 500), (0, 12)])
def test_share_is_wilsons_interval_of_scipy(successes: int, n: int) -> None:
    got = share([*np.ones(successes), *np.zeros(n - successes), np.nan])
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert got is not None and (got.mean, got.n) == (successes / n, n)
    assert [got.low, got.high] == pytest.approx([expected.low, expected.high])
    assert 0.0 <= got.low <= got.mean <= got.high <= 1.0


def test_share_refuses_what_is_none() -> None:
    assert share([np.nan]) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        share([0.5, 1.5])


@pytest.mark.parametrize("means", [[0.99, 0.99, 1.0], [0.45, 1.0, 1.0], [0.0, 0.02, 0.3], [1.0, 1.0], [0.0, 0.0, 0.0]])
def test_shares_over_runs_stay_between_0_and_1(means: list[float]) -> None:
    """Student's t interval of the second is 0.82 plus and minus 0.79."""
    got = shares_over_runs(means)
    assert got.mean == pytest.approx(np.mean(means)) and got.n == len(means)
    assert 0.0 <= got.low <= got.mean <= got.high <= 1.0
    assert (got.low == got.high) is (len(set(means)) == 1)


def test_limits_of_a_share_that_is_far_from_both_ends_are_the_plain_ones() -> None:
    low, high = limits(np.array([0.5, 0.3]), np.array([0.01, 0.001]))
    assert low == pytest.approx([0.49, 0.299], abs=1e-4) and high == pytest.approx([0.51, 0.301], abs=1e-4)
    # By hand: log-odds of 0.8 are log 4, and 0.1 / (0.8 * 0.2) is 0.625.
    low, high = limits(np.array([0.8]), np.array([0.1]))
    odds = 4 * np.exp([-0.625, 0.625])
    assert [low[0], high[0]] == pytest.approx(odds / (1 + odds))


def test_sign_flip_p_equals_enumeration() -> None:
    differences = np.random.default_rng(4).normal(0.4, 1.0, size=11)
    flipped = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=11)]
    expected = np.mean(np.abs(flipped) >= abs(differences.mean()) - 1e-12)
    assert sign_flip_p([*differences, np.nan]) == pytest.approx(expected)
    assert sign_flip_p([3.0]) == 1.0
    assert sign_flip_p(np.zeros(300)) == 1.0
    assert sign_flip_p([0.0] * 299 + [1.0]) == 1.0  # one prompt alone is as extreme with either sign


def test_sign_flip_p_of_many_prompts_is_that_of_the_t_test() -> None:
    differences = stats.zscore(np.random.default_rng(5).normal(size=400)) + 0.09
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert 0.05 < expected < 0.1
    assert sign_flip_p(differences) == pytest.approx(expected, abs=0.01)


def test_sign_flip_p_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(6)
    p = [sign_flip_p(rng.exponential(size=8) - rng.exponential(size=8)) for _ in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def logistic_at_zero(wins: Array, difference: Array) -> float:
    """The penalised fit by a general minimiser, predicted at equal length."""
    x = np.tanh(difference / difference.std())

    def loss(beta: Array) -> float:
        logits = beta[0] + beta[1] * x
        return float(np.sum(np.logaddexp(0, logits) - wins * logits) + RIDGE / 2 * beta @ beta)

    beta = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12}).x
    return float(1 / (1 + np.exp(-beta[0])))


@pytest.mark.parametrize("case", ["mixed", "ties", "separable", "always wins", "rarely shorter"])
def test_length_controlled_win_rate_equals_a_general_minimiser(case: str) -> None:
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 40, size=(2, 150)).astype(float)
    if case == "rarely shorter":
        lengths[0] += 25
    difference = lengths[0] - lengths[1]
    scores = rng.normal(size=150) + 0.05 * difference
    if case == "ties":
        scores = np.round(scores)
    if case == "separable":
        scores = difference + 0.5
    if case == "always wins":
        scores = np.ones(150)
    got = length_controlled_win_rate(scores, np.zeros(150), lengths[0], lengths[1], samples=50)
    assert got is not None
    assert got.mean == pytest.approx(logistic_at_zero((np.sign(scores) + 1) / 2, difference), abs=1e-5)
    assert got.low <= got.mean <= got.high


def test_length_controlled_intervals_equal_scipy() -> None:
    rng = np.random.default_rng(8)
    lengths = rng.normal(20, 6, size=(2, 120))
    difference = lengths[0] - lengths[1]
    scores = 0.3 + 0.08 * difference + rng.normal(size=120)
    scale = difference.std()

    def rate(wins: Array, x: Array) -> float:  # the scale belongs to the model: it is not drawn anew
        def loss(beta: Array) -> Any:
            logits = beta[0] + beta[1] * np.tanh(x / scale)
            return np.sum(np.logaddexp(0, logits) - wins * logits) + RIDGE / 2 * beta @ beta

        return float(1 / (1 + np.exp(-optimize.minimize(loss, np.zeros(2), method="BFGS").x[0])))

    def equal(y: Array, x: Array) -> float:
        return float(np.polyfit(x, y, 1)[1])

    zeros = np.zeros(120)
    for function, statistic, values in (
        (length_controlled_win_rate, rate, (np.sign(scores) + 1) / 2),
        (length_controlled_difference, equal, scores),
    ):
        got = function(scores, zeros, lengths[0], lengths[1], 2000, 3)
        expected = stats.bootstrap(
            (values, difference), statistic, n_resamples=600, paired=True, vectorized=False, method="percentile", rng=9
        ).confidence_interval
        assert got is not None
        assert got.mean == pytest.approx(statistic(values, difference), abs=1e-5)
        width = expected.high - expected.low
        assert got.low == pytest.approx(expected.low, abs=0.1 * width)
        assert got.high == pytest.approx(expected.high, abs=0.1 * width)


def test_a_policy_that_is_only_longer_does_not_win_at_equal_length() -> None:
    rng = np.random.default_rng(10)
    n = 20_000
    longer = rng.normal(6, 8, size=n)
    wins = rng.random(n) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    lengths = (20 + longer, np.full(n, 20.0))
    plain = win_rate(wins, ~wins)
    controlled = length_controlled_win_rate(wins, ~wins, *lengths, samples=50)
    assert plain is not None and controlled is not None
    assert plain.mean > 0.65
    assert controlled.mean == pytest.approx(0.5, abs=0.015)
    gain = length_controlled_difference(0.1 * longer + rng.normal(size=n), np.zeros(n), *lengths, samples=50)
    assert gain is not None and gain.mean == pytest.approx(0, abs=0.03)


def test_a_policy_that_is_better_at_equal_length_wins_there() -> None:
    rng = np.random.default_rng(11)
    n = 20_000
    longer = rng.normal(-6, 8, size=n)  # and shorter, which hides it
    wins = rng.random(n) < 1 / (1 + np.exp(-1 - 2 * np.tanh(longer / longer.std())))
    lengths = (20 + longer, np.full(n, 20.0))
    plain = win_rate(wins, ~wins)
    controlled = length_controlled_win_rate(wins, ~wins, *lengths, samples=50)
    assert plain is not None and controlled is not None
    assert plain.mean < 0.6
    assert controlled.mean == pytest.approx(1 / (1 + np.exp(-1)), abs=0.015)
    gain = length_controlled_difference(0.7 + 0.1 * longer + rng.normal(size=n), np.zeros(n), *lengths, samples=50)
    assert gain is not None and gain.mean == pytest.approx(0.7, abs=0.03)


def test_lengths_that_do_not_vary() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.5, 2.0, 0.0])
    same, five = np.full(4, 9), np.full(4, 14)
    assert length_controlled_win_rate(a, b, five, same) is None  # what five tokens do and what the model does: unknown
    assert length_controlled_difference(a, b, five, same) is None
    assert pooled([a - b], [five - same]) is None
    assert length_controlled_difference(a, b, same, same) == bootstrap(a - b)
    rate, plain = length_controlled_win_rate(a, b, same, same), win_rate(a, b)
    assert rate is not None and plain is not None
    assert rate.mean == pytest.approx(plain.mean, abs=0.002)  # the ridge, of four prompts
    assert length_controlled_win_rate([np.nan], [1.0], [2], [1]) is None


def test_pooled_equals_a_loop_over_resamples() -> None:
    rng = np.random.default_rng(12)
    lengths = rng.normal(3, 5, size=(3, 60))
    values = rng.normal(size=(3, 1)) + rng.normal(size=60) + 0.1 * lengths
    means, intercepts = [], []
    for _ in range(4000):
        chosen = np.ix_(rng.integers(0, 3, 3), rng.integers(0, 60, 60))
        means.append(values[chosen].mean())
        intercepts.append(np.polyfit(lengths[chosen].ravel(), values[chosen].ravel(), 1)[1])
    for got, drawn, estimate in (
        (pooled(values, samples=4000), means, values.mean()),
        (pooled(values, lengths, samples=4000), intercepts, np.polyfit(lengths.ravel(), values.ravel(), 1)[1]),
    ):
        assert got is not None
        assert got.mean == pytest.approx(estimate)
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert got.low == pytest.approx(low, abs=0.08 * (high - low))
        assert got.high == pytest.approx(high, abs=0.08 * (high - low))


def test_pooled_one_run_is_the_bootstrap_and_gaps_are_left_out() -> None:
    values = np.random.default_rng(13).normal(size=200)
    one, plain = pooled([values]), bootstrap(values)
    assert one is not None and plain is not None
    assert one.mean == pytest.approx(plain.mean)
    width = plain.high - plain.low
    assert one.low == pytest.approx(plain.low, abs=0.08 * width)
    assert one.high == pytest.approx(plain.high, abs=0.08 * width)
    gap = pooled([[1.0, np.nan, 3.0], [3.0, 9.0, 5.0]])
    assert gap is not None and (gap.mean, gap.n) == (3.0, 2)
    assert pooled([[np.nan], [1.0]]) is None


def test_over_runs_is_the_t_interval() -> None:
    got = over_runs([0.1, 0.3, 0.5])
    half = 4.302653 * 0.2 / np.sqrt(3)  # the 97.5 % quantile of t with 2 degrees of freedom, from a table
    assert got.n == 3
    assert [got.mean, got.low, got.high] == pytest.approx([0.3, 0.3 - half, 0.3 + half])
