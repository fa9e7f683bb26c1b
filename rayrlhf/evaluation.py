"""What an evaluation says: means over prompts with bootstrap intervals, win rates, and the tables that hold them.

Pure functions of numpy arrays with one entry a prompt ([n]). A NaN entry means "not measured for this prompt": it is
left out, and the interval's `n` counts the prompts that remain. A measure that is not defined at all is None, and
null in evaluation.json. An infinite entry is an error of the caller and raises ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from rayrlhf.data.records import Prompt
from rayrlhf.rouge import rouge_per_example
from rayrlhf.run import replacing

CONFIDENCE = 0.95
_ROUGE = ("rouge1", "rouge2", "rougeL")
_BLOCK = 4_000_000
"""Resampled values held at once, to bound memory."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` prompts and its percentile-bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Answers:
    """One source's answers to the n prompts of an evaluation, in the order of the prompts, and what was measured.

    A measure that this source does not have is None; a prompt that it does not answer has text None.
    """

    name: str
    texts: Sequence[str | None]
    """[n]"""
    rewards: ArrayLike | None = None
    """[n] reward model's scores."""
    gold: ArrayLike | None = None
    """[n] the labeller's own measure; None where the labeller is people or already the same text."""
    lengths: ArrayLike | None = None
    """[n] tokens of the answer, EOS included when it was sampled."""
    finished: ArrayLike | None = None
    """[n] whether the answer ended with EOS; None for texts that were not sampled."""
    kl: ArrayLike | None = None
    """[n] sum over tokens of log p - log p_ref of a separate sample at the training temperature, nats."""
    rouge: Mapping[str, ArrayLike] = field(default_factory=dict)
    """[n] F1 by name, filled in by `with_rouge`."""

    def measure(self, name: str) -> NDArray[np.float64] | None:
        """[n] values of one of `MEASURES` or of `kl`; NaN where there is no text, None if never measured."""
        sources = {"reward": self.rewards, "gold": self.gold, "length": self.lengths, "eos_rate": self.finished}
        raw = {**sources, "kl": self.kl, **self.rouge}.get(name)
        if raw is None:
            return None
        values = np.asarray(raw, dtype=np.float64)
        if values.shape != (len(self.texts),):
            raise ValueError(f"{self.name}: {name} has shape {values.shape}, expected ({len(self.texts)},)")
        return np.where([text is None for text in self.texts], np.nan, values)


MEASURES = ("reward", "gold", *_ROUGE, "length", "eos_rate")


def bootstrap(values: ArrayLike, samples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE) -> Interval | None:
    """Mean of `values` [n] with a percentile-bootstrap interval over prompts; None if no value is measured.

    Equal `seed` and n give equal resamples, so that measures of the same prompts are resampled alike.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.

    Raises:
        ValueError: an infinite value, or not one dimension.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or np.isinf(given).any():
        raise ValueError("bootstrap needs finite values (or NaN for not measured) in one dimension")
    measured = given[~np.isnan(given)]
    n = len(measured)
    if n == 0:
        return None
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    sizes = [min(block, samples - start) for start in range(0, samples, block)]
    means = np.concatenate([measured[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(measured.mean()), float(low), float(high), n)


def paired_difference(
    a: ArrayLike, b: ArrayLike, samples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval | None:
    """Mean of a - b with its interval, resampling prompts, not answers: both [n], same prompts in the same order."""
    left, right = _same_prompts(a, b)
    return bootstrap(left - right, samples, seed, confidence)


def win_rate(
    a: ArrayLike, b: ArrayLike, samples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval | None:
    """Share of prompts on which a scores above b, a tie counting half; both [n], same prompts in the same order."""
    left, right = _same_prompts(a, b)
    wins = np.where(left > right, 1.0, np.where(left == right, 0.5, 0.0))
    return bootstrap(np.where(np.isnan(left) | np.isnan(right), np.nan, wins), samples, seed, confidence)


def with_rouge(answers: Answers, references: Sequence[str | None]) -> Answers:
    """The same answers with ROUGE F1 against `references` [n]; NaN where either text is missing."""
    pairs = [
        (i, text, reference)
        for i, (text, reference) in enumerate(zip(answers.texts, references, strict=True))
        if text is not None and reference is not None
    ]
    if not pairs:
        return answers
    rows, texts, targets = zip(*pairs, strict=True)
    scores = rouge_per_example(texts, targets)
    filled = {name: np.full(len(references), np.nan) for name in _ROUGE}
    for name in _ROUGE:
        filled[name][list(rows)] = scores[name]
    return Answers(**{**vars(answers), "rouge": filled})


def summarize(
    prompts: Sequence[Prompt],
    sft: Answers,
    policy: Answers | None,
    reference: Answers,
    title: Answers | None,
    *,
    labeller: str,
    metadata: Mapping[str, Any],
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The contents of evaluation.json, from answers to the same n prompts.

    Each of `sft`, `policy`, `title` and `reference` maps every name of `MEASURES` to
    `{"mean", "low", "high", "n"}` or null. Win rates are by the reward model. `win_rate_vs_reference` is null for the
    reference itself, and for all where the labeller is the reference: a reward model that learnt "closer to the
    reference is better" says nothing about beating it. ROUGE and gold of the reference against itself are null.
    `differences.policy_minus_sft` holds paired differences, of which gold tells reward hacking from progress.

    Args:
        prompts: the n prompts; their `reference` is what ROUGE compares with.
        sft, policy: the models' answers; `policy` is None before PPO.
        reference: the people's own answers (text None where there is none).
        title: the posts' titles as answers, the baseline that costs nothing.
        labeller: `reference`, or who else made the comparisons that the reward model learnt from.
        metadata: what else belongs to the record: split, checkpoint paths, seeds.
        samples, seed: of the bootstrap.

    Raises:
        ValueError: answers that do not match the prompts in number, or an infinite measure.
    """
    references = [prompt.reference for prompt in prompts]
    sources = {"sft": sft, "policy": policy, "title": title, "reference": reference}
    present = {name: answers for name, answers in sources.items() if answers is not None}
    for name, answers in present.items():
        if len(answers.texts) != len(prompts):
            raise ValueError(f"{name}: {len(answers.texts)} answers to {len(prompts)} prompts")
        if name != "reference":
            present[name] = with_rouge(answers, references)

    def interval(values: NDArray[np.float64] | None) -> dict[str, float] | None:
        return None if values is None else _as_dict(bootstrap(values, samples, seed))

    def compare(function: Any, a: Answers, b: Answers, measure: str) -> dict[str, float] | None:
        left, right = a.measure(measure), b.measure(measure)
        return None if left is None or right is None else _as_dict(function(left, right, samples, seed))

    result: dict[str, Any] = {}
    for name, answers in present.items():
        row: dict[str, Any] = {measure: interval(answers.measure(measure)) for measure in MEASURES}
        meaningful = name != "reference" and labeller != "reference"
        row["win_rate_vs_reference"] = compare(win_rate, answers, reference, "reward") if meaningful else None
        if name == "policy":
            row["win_rate_vs_sft"] = compare(win_rate, answers, sft, "reward")
            row["kl"] = interval(answers.measure("kl"))
        result[name] = row
    if "policy" in present:
        changes = {m: compare(paired_difference, present["policy"], present["sft"], m) for m in MEASURES}
        result["differences"] = {"policy_minus_sft": changes}
    bootstrap_facts = {"samples": samples, "seed": seed, "confidence": CONFIDENCE, "unit": "prompt"}
    result["metadata"] = {"labeller": labeller, "prompts": len(prompts), "bootstrap": bootstrap_facts, **metadata}
    return result


def samples_table(prompts: Sequence[Prompt], answers: Sequence[Answers]) -> pa.Table:
    """One row a prompt: `id`, `post`, a text column named after each source, `reward_NAME` and `gold_NAME`."""
    columns: dict[str, Any] = {"id": [p.id for p in prompts], "post": [p.text for p in prompts]}
    columns |= {source.name: pa.array(source.texts, pa.string()) for source in answers}
    for measure in ("reward", "gold"):
        for source in answers:
            values = source.measure(measure)
            if values is not None:
                columns[f"{measure}_{source.name}"] = pa.array(values, pa.float64(), from_pandas=True)  # NaN is null
    return pa.table(columns)


def write_samples(path: Path, table: pa.Table) -> None:
    """Write samples.parquet by one rename."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def write_evaluation(path: Path, result: Mapping[str, Any]) -> None:
    """Write evaluation.json by one rename; strict JSON.

    Raises:
        ValueError: a number that is not finite.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _same_prompts(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a pair needs the same prompts: shapes {left.shape} and {right.shape}")
    return left, right


def _as_dict(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)
