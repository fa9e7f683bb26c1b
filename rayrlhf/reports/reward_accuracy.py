"""How often a reward model orders held-out pairs as people did, beside simple scorers such as the answer's length.

Without the simple scorers an accuracy says little: where people prefer the longer answer, counting tokens goes far. A
pair's margin is score(better) - score(worse). A pair is ordered rightly if its margin is positive; a tie counts half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.files import replacing
from rayrlhf.reports.measures import SCORERS
from rayrlhf.resampling import CONFIDENCE, cluster_bootstrap


def heldout_pairs(comparisons: Sequence[RankedAnswers], margins: ArrayLike, logprobs: ArrayLike | None) -> pa.Table:
    """One row a pair: `id` of its record, `prompt` (a number; records with equal prompts share it), `better` and
    `worse` (indices of the record's answers), `source`, and each scorer's margin under its name in `SCORERS`.

    Args:
        comparisons: the records, in order.
        margins: [m] the reward model's, pair by pair, as `rayrlhf.algorithms.ranked_pass.ranked_pass` returns them.
        logprobs: [n] sum of each answer's token log-probs under the SFT model, nats, answer by answer; None, and no
            columns for it, in a run without one.
    """
    sums = None if logprobs is None else iter(np.asarray(logprobs, np.float64).tolist())
    own = iter(np.asarray(margins, np.float64).tolist())
    numbers: dict[tuple[int, ...], int] = {}
    rows = []
    for c in comparisons:
        prompt = numbers.setdefault(c.prompt_ids, len(numbers))
        lengths = [len(ids) for ids in c.response_ids]
        totals = None if sums is None else [next(sums) for _ in lengths]
        for better, worse in c.pairs:
            row = {
                "id": c.id, "prompt": prompt, "better": better, "worse": worse, "source": c.source,
                "reward_model": next(own),
                "longer": float(lengths[better] - lengths[worse]),
                "shorter": float(lengths[worse] - lengths[better]),
            }  # fmt: skip
            if totals is not None:
                row["sft_logprob_sum"] = totals[better] - totals[worse]
                row["sft_logprob_mean"] = totals[better] / lengths[better] - totals[worse] / lengths[worse]
            rows.append(row)
    return pa.Table.from_pylist(rows)


def accuracies(pairs: pa.Table, prompts: ArrayLike, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Accuracy of every scorer over m pairs, and the paired difference reward model minus each of the others.

    Each is `{"mean", "low", "high", "n"}`: a mean over pairs, its 95 % interval over prompts, and n prompts; all from
    the same resamples.

    Args:
        pairs: a column of margins [m] for each of `SCORERS`, those of the SFT model only in a run that has one.
        prompts: [m] what each pair's prompt is called; pairs of one prompt stand or fall together.
    """
    right = {name: _right(pairs.column(name).to_numpy()) for name in SCORERS if name in pairs.column_names}
    own = right["reward_model"]

    def interval(values: NDArray[np.float64]) -> dict[str, float]:
        return asdict(cluster_bootstrap(values, prompts, samples, seed))

    return {
        "accuracy": {name: interval(values) for name, values in right.items()},
        "reward_model_minus": {name: interval(own - right[name]) for name in right if name != "reward_model"},
        "ties": {name: int((values == 0.5).sum()) for name, values in right.items()},
    }


def unbeaten(result: Mapping[str, Any]) -> list[str]:
    """The scorers, in words, that the reward model does not clearly beat.

    The interval of its paired difference to such a scorer is not wholly above 0.

    Args:
        result: the contents of reward_model.json.
    """
    return [SCORERS[name] for name, difference in result["reward_model_minus"].items() if difference["low"] <= 0]


def minus_length(result: Mapping[str, Any]) -> float:
    """Accuracy of the reward model minus that of the answer's length, whichever of longer and shorter does better.

    Args:
        result: the contents of reward_model.json.
    """
    return min(float(result["reward_model_minus"][name]["mean"]) for name in ("longer", "shorter"))


def write_accuracy(
    pairs_path: Path, path: Path, pairs: pa.Table, metrics: Mapping[str, float], samples: int, seed: int
) -> dict[str, Any]:
    """Write `pairs` (Parquet) and what they say (JSON: `accuracies`, `metrics` and counts), each by one rename.

    Returns what they say.

    Raises:
        ValueError: a number that is not finite.
    """
    prompts = pairs.column("prompt").to_numpy()
    result = {
        "prompts": len(np.unique(prompts)),
        "pairs": pairs.num_rows,
        **accuracies(pairs, prompts, samples, seed),
        "metrics": dict(metrics),
        "bootstrap": {"samples": samples, "seed": seed, "confidence": CONFIDENCE, "unit": "prompt"},
    }
    with replacing(pairs_path) as temporary:
        pq.write_table(pairs, temporary, write_page_checksum=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return result


def _right(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
