"""Accuracy beside baselines: planted scores, cluster resampling against a naive loop, scipy and its true coverage."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats

from rayrlhf import resampling
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.reports.intervals import bootstrap
from rayrlhf.reports.measures import SCORERS
from rayrlhf.reports.page import write_report
from rayrlhf.reports.reward_accuracy import (
    accuracies,
    heldout_pairs,
    unbeaten,
    write_accuracy,
)
from rayrlhf.reports.tables import reward_accuracy_table
from rayrlhf.resampling import cluster_bootstrap, clustered_share
from rayrlhf.runs.folder import open_or_create


def planted() -> pa.Table:
    """Four pairs of two prompts; the second and third record share a prompt."""
    answers = [((5, 6, 7), (5, 6), (5,)), ((8, 9), (9, 8)), ((8,), (9, 9, 9))]
    prompts = [(2, 3), (2, 4), (2, 4)]
    scores: list[tuple[float, ...] | None] = [(3.0, 2.0, 2.0), None, None]
    records = [
        RankedAnswers(f"r{i}", "", prompt, ("",) * len(ids), ids, own, "people", source="s")
        for i, (prompt, ids, own) in enumerate(zip(prompts, answers, scores, strict=True))
    ]
    # Sums of log-probs, answer by answer: -6, -5 and -1 for three, two and one token of the first record.
    return heldout_pairs(records, [0.5, -0.25, 0.0, 2.0], [-6.0, -5.0, -1.0, -4.0, -4.0, -2.0, -5.0])


def test_margins_of_planted_answers() -> None:
    pairs = planted().to_pydict()
    assert pairs["id"] == ["r0", "r0", "r1", "r2"] and pairs["prompt"] == [0, 0, 1, 1]
    assert list(zip(pairs["better"], pairs["worse"], strict=True)) == [(0, 1), (0, 2), (0, 1), (0, 1)]
    assert pairs["reward_model"] == [0.5, -0.25, 0.0, 2.0]
    assert pairs["longer"] == [1, 2, 0, -2] and pairs["shorter"] == [-1, -2, 0, 2]
    assert pairs["sft_logprob_sum"] == [-1, -5, 0, 3]
    assert pairs["sft_logprob_mean"] == pytest.approx([-2 + 2.5, -2 + 1, 0, -2 + 5 / 3])


def test_accuracies_count_ties_half_and_pair_the_differences() -> None:
    pairs = planted()
    found = accuracies(pairs, pairs.column("prompt").to_numpy(), samples=400, seed=1)
    means = {name: interval["mean"] for name, interval in found["accuracy"].items()}
    assert means == {
        "reward_model": 0.625, "longer": 0.625, "shorter": 0.375, "sft_logprob_sum": 0.375, "sft_logprob_mean": 0.375
    }  # fmt: skip
    assert found["ties"] == dict.fromkeys(SCORERS, 1)
    assert {name: each["mean"] for name, each in found["reward_model_minus"].items()} == {
        "longer": 0.0, "shorter": 0.25, "sft_logprob_sum": 0.25, "sft_logprob_mean": 0.25
    }  # fmt: skip
    # Two prompts: every resample holds the one, the other or both. Reward model: 1/2, 3/4; minus longer: -1/2, 1/2.
    accuracy, difference = found["accuracy"]["reward_model"], found["reward_model_minus"]["longer"]
    assert (accuracy["low"], accuracy["high"], accuracy["n"]) == (0.5, 0.75, 2)
    assert (difference["low"], difference["high"], difference["n"]) == (-0.5, 0.5, 2)


def clustered(seed: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Rights and wrongs that go together within a prompt; one to six pairs a prompt, in mixed order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, clusters)
    index = np.repeat(np.arange(clusters), sizes)
    right = (rng.random(len(index)) < np.repeat(rng.beta(1.2, 0.8, clusters), sizes)).astype(float)
    order = rng.permutation(len(index))
    return right[order], index[order]


def test_cluster_bootstrap_equals_a_naive_loop_and_scipy() -> None:
    values, clusters = clustered(seed=3, clusters=60)
    got = cluster_bootstrap(values, [f"prompt {i}" for i in clusters], 4000, seed=0)
    assert got.mean == pytest.approx(values.mean()) and got.n == 60
    rng = np.random.default_rng(9)
    groups = [values[clusters == i] for i in range(60)]
    naive = [np.concatenate([groups[i] for i in rng.integers(0, 60, 60)]).mean() for _ in range(4000)]
    sums, counts = np.array([g.sum() for g in groups]), np.array([float(len(g)) for g in groups])
    scipys = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis), paired=True, n_resamples=4000,
        method="percentile", rng=np.random.default_rng(8),
    ).confidence_interval  # fmt: skip
    width = got.high - got.low
    assert [got.low, got.high] == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.06 * width)
    assert [got.low, got.high] == pytest.approx([scipys.low, scipys.high], abs=0.06 * width)
    one_by_one = bootstrap(values, 4000)
    assert one_by_one is not None and width > 1.15 * (one_by_one.high - one_by_one.low), "pairs of a prompt go together"


def test_cluster_bootstrap_covers_the_true_mean_where_pairs_go_together() -> None:
    hits = 0
    for trial in range(300):
        values, clusters = clustered(seed=trial, clusters=80)
        got = cluster_bootstrap(values, clusters, 400, seed=trial)
        hits += got.low <= 0.6 <= got.high  # the mean of Beta(1.2, 0.8)
    assert 0.90 <= hits / 300 <= 0.98


def test_a_share_of_clusters_is_wilsons_interval_of_as_many_independent_values() -> None:
    for right, count in ((20, 20), (0, 3), (1, 1)):  # all alike, or one alone: as many as there are clusters
        wilson = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
        for each in (1, 6):
            values, clusters = np.repeat([1.0] * right + [0.0] * (count - right), each), np.repeat(range(count), each)
            got = clustered_share(values, clusters)
            assert (got.low, got.high, got.n) == pytest.approx((wilson.low, wilson.high, count))
    values = np.array([1.0] * 13 + [0.0] * 7)
    got, again = clustered_share(values, range(20)), clustered_share(np.repeat(values, 3), np.repeat(range(20), 3))
    assert (got.low, got.high) == pytest.approx((again.low, again.high)), "a cluster of equal values is one of them"
    # The limits solve the score equation with t's quantile, of values whose variance has Bessel's correction.
    for limit in (got.low, got.high):
        assert (got.mean - limit) ** 2 == pytest.approx(stats.t.ppf(0.975, 19) ** 2 * limit * (1 - limit) / 19)
    for cluster in ([1.0, 0.0], [1.0, 1.0, 0.0]):  # thirds are not exact
        same = clustered_share(cluster * 30, np.repeat(range(30), len(cluster)))
        wilson = stats.binomtest(30 * int(sum(cluster)) // len(cluster), 30).proportion_ci(0.95, "wilson")
        assert (same.low, same.high) == pytest.approx((wilson.low, wilson.high))
    nearly = clustered_share([1.0, 0.0] * 29 + [1.0, 1.0], np.repeat(range(30), 2))
    effective = 60 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 29)) ** 2
    assert (nearly.mean - nearly.low) ** 2 == pytest.approx(
        stats.norm.ppf(0.975) ** 2 * nearly.low * (1 - nearly.low) / effective
    ), "as many as there are values at most"
    for wrong, of in (([], []), ([1.1], ["p"]), ([np.nan], ["p"]), ([1.0], ["p", "q"])):
        with pytest.raises(ValueError, match="values from 0 to 1"):
            clustered_share(wrong, of)


def test_a_share_of_ten_clusters_covers_the_true_one() -> None:
    """Where the bootstrap does not: it has too little room, and none if all are alike."""
    hits = np.zeros(2)
    for trial in range(300):
        values, clusters = clustered(seed=trial, clusters=10)
        both = clustered_share(values, clusters), cluster_bootstrap(values, clusters, 200, seed=trial)
        hits += [got.low <= 0.6 <= got.high for got in both]
    ours, bootstraps = hits / 300
    assert ours >= 0.92 > bootstraps


def test_one_value_a_cluster_is_the_ordinary_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=40)
    expected = bootstrap(values, 301, seed=2)
    assert cluster_bootstrap(values, np.arange(40), 301, seed=2) == expected
    monkeypatch.setattr(resampling, "_BLOCK", 90)
    assert cluster_bootstrap(values, np.arange(40), 301, seed=2) == expected


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [1.0, 2.0, 3.0]])
def test_cluster_bootstrap_refuses_what_it_cannot_resample(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values in one dimension, and a cluster for each"):
        cluster_bootstrap(values, [0, 1][: len(values)])


def test_scorers_that_are_not_clearly_beaten() -> None:
    lows = {"longer": -0.01, "shorter": 0.02, "sft_logprob_sum": 0.0, "sft_logprob_mean": 0.001}
    result = {"reward_model_minus": {name: {"mean": 0.1, "low": low, "high": 0.2} for name, low in lows.items()}}
    assert unbeaten(result) == ["longer answer", "SFT log-prob, sum"]
    assert unbeaten({"reward_model_minus": {"longer": {"mean": 0.1, "low": 0.01, "high": 0.2}}}) == []


def test_file_table_and_report_say_the_same(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "demo"}, "test"), tmp_path)
    write_accuracy(
        run.heldout_pairs, run.reward_accuracy, planted(), {"reward_model/heldout_loss": 0.7}, samples=50, seed=3
    )
    result = json.loads(run.reward_accuracy.read_text())
    assert (result["prompts"], result["pairs"], result["metrics"]) == (2, 4, {"reward_model/heldout_loss": 0.7})
    assert result["bootstrap"] == {"samples": 50, "seed": 3, "confidence": 0.95, "unit": "prompt"}
    assert pq.read_table(run.heldout_pairs).equals(planted())
    assert {path.name for path in run.path.iterdir() if not path.name.startswith(".lock")} == {
        "config.yaml", "reward_model.json", "heldout_pairs.parquet"
    }  # fmt: skip

    console = Console(width=120, file=(shown := io.StringIO()))
    console.print(reward_accuracy_table(result))
    text = shown.getvalue()
    assert "4 held-out pairs of 2 prompts" in text
    rows = {line.split("  ")[1].strip(): line for line in text.splitlines() if "[" in line}
    assert "0.625 [0.500, 0.750]" in rows["reward model"] and "0.250 [0.000, 0.500]" in rows["shorter answer"]
    html = write_report(run).read_text(encoding="utf-8")
    for words in SCORERS.values():
        assert f'<th scope="row">{words}</th>' in html
    assert '<td title="n = 2">0.625<br><span class="ci">0.500 to 0.750</span></td>' in html

    with pytest.raises(ValueError, match="not JSON compliant"):
        write_accuracy(run.heldout_pairs, run.reward_accuracy, planted(), {"x": float("nan")}, samples=50, seed=3)
    assert json.loads(run.reward_accuracy.read_text()) == result
