"""Where gold was best in the course of `rl`, and whether it fell from there while the score went on rising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.resampling import Array

FEW_STEPS = 12
"""Below that no peak of gold is looked for."""
ERRORS_APART = 3.0
"""Standard errors by which gold must have fallen and the score risen: the peak is the best of many windows."""


@dataclass(frozen=True)
class Peak:
    """Gold in its best window of RL steps, and in the last window; windows are of equal size."""

    first_step: int
    """The first step that has all the measures."""
    step: int
    """In the middle of the best window."""
    last_step: int
    gold: tuple[float, float, float]
    """Mean gold of the first, the best and the last window."""
    score: tuple[float, float]
    """Mean score of the best and of the last window."""
    kl: tuple[float | None, float | None]
    """KL of the best and of the last window, nats per response."""
    fell: float
    """Standard errors by which gold fell from its best to its last window; 0 where the two overlap."""
    rose: float
    """Standard errors by which the score rose between them."""
    gained: float
    """Standard errors by which gold rose from its first to its last window."""

    @property
    def over_optimised(self) -> bool:
        """Whether gold fell while the score that RL raises went on rising (Gao et al. 2023)."""
        return min(self.fell, self.rose) > ERRORS_APART


def peak_of_gold(lines: Sequence[Mapping[str, Any]], samples_per_prompt: int = 1) -> Peak | None:
    """Where gold was best in the course of `rl`; None for fewer than `FEW_STEPS` steps with gold and score.

    A window has a sixth of the steps, at most ten. Steps are independent batches, so that their squared standard errors
    std² / prompts add up.

    Args:
        lines: of stage `rl` of metrics.jsonl.
        samples_per_prompt: responses that share a prompt, which count as one.
    """
    names = [f"rl/{of}/{part}" for of in ("gold", "score") for part in ("mean", "std")]
    known = [line for line in lines if all(line.get(name) is not None for name in (*names, "rl/responses"))]
    n = len(known)
    if n < FEW_STEPS:
        return None
    gold, gold_std, score, score_std = (np.array([line[name] for line in known], np.float64) for name in names)
    prompts = np.maximum(1.0, np.array([line["rl/responses"] for line in known]) / samples_per_prompt)
    size = min(10, n // 6)
    golds, gold_errors = _windows(gold, gold_std**2 / prompts, size)
    scores, score_errors = _windows(score, score_std**2 / prompts, size)
    best, last = int(golds.argmax()), n - size
    apart = best + size <= last
    kls = [line.get("rl/kl") for line in known]

    def kl(at: int) -> float | None:
        own = [value for value in kls[at : at + size] if value is not None]
        return float(np.mean(own)) if own else None

    return Peak(
        first_step=known[0]["step"],
        step=known[best + size // 2]["step"],
        last_step=known[-1]["step"],
        gold=(float(golds[0]), float(golds[best]), float(golds[last])),
        score=(float(scores[best]), float(scores[last])),
        kl=(kl(best), kl(last)),
        fell=_apart(golds, gold_errors, best, last) if apart else 0.0,
        rose=_apart(scores, score_errors, last, best) if apart else 0.0,
        gained=_apart(golds, gold_errors, last, 0),
    )


def _windows(values: Array, squared_errors: Array, size: int) -> tuple[Array, Array]:
    """[n - size + 1] means over windows, and their squared standard errors."""
    flat = np.ones(size) / size
    means, errors = np.convolve(values, flat, "valid"), np.convolve(squared_errors, flat / size, "valid")
    return np.asarray(means, np.float64), np.asarray(errors, np.float64)


def _apart(means: Array, squared_errors: Array, high: int, low: int) -> float:
    """Standard errors of the difference by which one window is above another."""
    difference = float(means[high] - means[low])
    error = float(np.sqrt(squared_errors[high] + squared_errors[low]))
    return difference / error if error else float(np.sign(difference)) * np.inf if difference else 0.0
