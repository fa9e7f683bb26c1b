"""The reward model's part of report.html: is it calibrated, where is it right, and does it follow length?

A pair's margin m is score(better) - score(worse). The model holds it for right with the confidence sigmoid(|m|), as its
loss says (Bradley & Terry 1952), and it is right where m > 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rayrlhf.reports.page.charts import Chart, Series
from rayrlhf.resampling import Array, cluster_bootstrap

FEWEST = 20
"""Pairs in a bin: fewer say nothing."""
BINS = 10


@dataclass(frozen=True)
class Bin:
    """The pairs whose values lie between two limits."""

    at: float
    """Their mean value."""
    share: float
    low: float
    high: float
    """Share of them that is ordered rightly, ties counting half, and its 95 % interval over prompts."""
    n: int


def binned(values: Array, right: Array, prompts: NDArray[np.int64], bins: int = BINS) -> list[Bin]:
    """Pairs in bins of equal size by a value of theirs: at most `bins`, of at least `FEWEST` pairs.

    Args:
        values: [m].
        right: [m] 1 for a pair that is ordered rightly, 0.5 for a tie, 0 otherwise.
        prompts: [m] number of the prompt; those of one prompt are drawn together.
    """
    count = min(bins, len(values) // FEWEST)
    if not count:
        return []
    found: list[Bin] = []
    for places in np.array_split(np.argsort(values, kind="stable"), count):
        own = cluster_bootstrap(right[places], prompts[places])
        at = float(values[places].mean())
        if found and at <= found[-1].at:  # many equal values, which fill several bins
            continue
        found.append(Bin(at, own.mean, own.low, own.high, len(places)))
    return found


def calibration_error(margins: Array, right: Array, bins: int = BINS) -> float | None:
    """Mean distance of confidence and share, over bins of equal size; None for too few pairs.

    Source: Naeini et al. 2015, the expected calibration error.
    """
    count = min(bins, len(margins) // FEWEST)
    if not count:
        return None
    confidence = expit(np.abs(margins))
    groups = np.array_split(np.argsort(confidence, kind="stable"), count)
    apart = [len(g) * abs(float(confidence[g].mean() - right[g].mean())) for g in groups]
    return sum(apart) / len(margins)


def reward_model_charts(pairs: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[str]]:
    """Charts of the held-out pairs, and sentences on them.

    Args:
        pairs: rows of heldout_pairs.parquet.
    """
    if not pairs:
        return [], []
    margins, longer = (np.array([row[name] for row in pairs], np.float64) for name in ("reward_model", "longer"))
    prompts = np.array([row["prompt"] for row in pairs], np.int64)
    right = np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
    confidence = expit(np.abs(margins))
    charts = []
    if found := binned(confidence, right, prompts):
        ideal = Series("calibrated", [each.at for each in found], role="ideal")
        charts.append(_shares("Calibration", "confidence, sigmoid(|margin|)", found, ideal))
    if found := binned(np.abs(margins), right, prompts):
        charts.append(_shares("Accuracy by margin", "|margin|", found))
    if found := binned(longer, right, prompts):
        charts.append(_shares("Accuracy by length", "tokens that the better answer is longer", found))
    counts, edges = np.histogram(margins, bins=min(40, max(5, len(margins) // 8)))
    bars = Series("pairs", [float(count) for count in counts])
    middles = [float(value) for value in (edges[:-1] + edges[1:]) / 2]
    charts.append(Chart("Margins", "pairs", "margin, better − worse", middles, [bars], "bars", smooth=False))
    return charts, _sentences(margins, right, longer, confidence, prompts)


def _sentences(margins: Array, right: Array, longer: Array, confidence: Array, prompts: NDArray[np.int64]) -> list[str]:
    said = [f"Mean confidence {confidence.mean():.3f}, share ordered rightly {right.mean():.3f}."]
    error = calibration_error(margins, right)
    if error is None:
        said.append(f"{len(margins)} pairs are too few for calibration: a bin takes {FEWEST}.")
    else:
        surplus = cluster_bootstrap(confidence - right, prompts)
        side = (
            "over-confident"
            if surplus.low > 0
            else "under-confident"
            if surplus.high < 0
            else "neither over- nor under-confident"
        )
        said.append(f"Calibration error {error:.3f}; on the whole it is {side}.")
    if len(margins) > 2 and np.ptp(longer) > 0 and np.ptp(margins) > 0:
        from scipy.stats import spearmanr  # takes a second to import, and most pages have no pairs

        rho = float(spearmanr(margins, longer).statistic)
        said.append(f"Rank correlation of its margin with the difference in length: {rho:+.2f}.".replace("-", "−"))
    return said


def _shares(title: str, x_words: str, found: Sequence[Bin], *others: Series) -> Chart:
    own = Series(
        "ordered rightly",
        [each.share for each in found],
        [each.low for each in found],
        [each.high for each in found],
    )
    x = [each.at for each in found]
    sizes = {each.n for each in found}
    note = f"{len(found)} bins of {min(sizes)} to {max(sizes)} pairs; intervals over prompts."
    return Chart(title, "share", x_words, x, [own, *others], "points", smooth=False, note=note)
