"""An estimate with its interval, and the bootstrap that draws whole clusters, such as all pairs of one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
_BLOCK = 4_000_000
"""Resampled values held at once, to bound memory."""


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` prompts (or runs) and its interval."""

    mean: float
    low: float
    high: float
    n: int


def cluster_bootstrap(
    values: ArrayLike, clusters: ArrayLike, samples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval:
    """Mean of `values` [m] with a percentile-bootstrap interval that draws whole clusters with replacement.

    `clusters` [m] names each value's cluster; the interval's n counts clusters. A resample's mean is over the values
    that it holds, so large clusters weigh more, as they do in the mean itself. Equal seed and clusters give equal
    resamples. With one value a cluster this is the ordinary bootstrap.

    Source: Davison & Hinkley 1997, Bootstrap Methods and their Application, section 3.8 (resampling of groups).

    Raises:
        ValueError: no values, one that is not finite, or not one cluster a value.
    """
    given = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if given.ndim != 1 or given.shape != index.shape or not len(given) or not np.isfinite(given).all():
        raise ValueError("cluster_bootstrap needs finite values in one dimension, and a cluster for each")
    sums, counts = np.bincount(index, weights=given), np.bincount(index).astype(np.float64)
    n = len(counts)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    means = []
    for start in range(0, samples, block):
        drawn = rng.integers(0, n, (min(block, samples - start), n))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(given.mean()), float(low), float(high), n)
