"""The contents of evaluation.json and samples.parquet: measures of each model's answers, and their differences.

Arrays have one entry for each prompt ([n]). NaN means that the measure is missing for this prompt (see
`rayrlhf.reports.intervals`); None, null in evaluation.json, that the source has no such measure at all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from rayrlhf.data.records import Prompt
from rayrlhf.files import replacing
from rayrlhf.reports.intervals import (
    bootstrap,
    jackknife,
    length_controlled_difference,
    length_controlled_win_rate,
    paired_difference,
)
from rayrlhf.reports.measures import AT_EQUAL_LENGTH, DIVERSITY, MEASURES, SHARES, VS_PREVIOUS
from rayrlhf.reports.shares import share, win_rate
from rayrlhf.resampling import CONFIDENCE, Interval
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.rewards.diversity import (
    common_opening,
    common_opening_without,
    distinct_2,
    distinct_2_without,
    wording,
)
from rayrlhf.rewards.rouge import rouge_per_example

_ROUGE = ("rouge1", "rouge2", "rougeL")
Statistic = Callable[..., Interval | None]
PREVIOUS = "previous"
"""The source of answers that is the policy of the round before."""


@dataclass(frozen=True)
class Answers:
    """One source's answers to the n prompts of an evaluation, in their order, with the measures of each.

    A measure that this source does not have is None. A prompt that it does not answer has the text None.
    """

    name: str
    texts: Sequence[str | None]
    """[n]"""
    rewards: ArrayLike | None = None
    """[n] reward model's scores."""
    gold: ArrayLike | None = None
    """[n] the labeller's own measure; None if people are the labeller, or if it would compare a text with itself."""
    lengths: ArrayLike | None = None
    """[n] tokens of the answer, EOS included when it was sampled."""
    finished: ArrayLike | None = None
    """[n] whether the answer ended with EOS; None for texts that were not sampled."""
    kl: ArrayLike | None = None
    """[n] sum over tokens of log p - log p_ref of a separate sample at the training temperature, nats."""
    content_words: ArrayLike | None = None
    """[n] different words of the answer, function words aside, that stand in its prompt."""
    rouge: Mapping[str, ArrayLike] = field(default_factory=dict)
    """[n] F1 by name, filled in by `with_rouge`."""

    def measure(self, name: str) -> NDArray[np.float64] | None:
        """[n] values of one of `MEASURES` or of `kl`; NaN where there is no text, None if never measured."""
        sources = {"reward": self.rewards, "gold": self.gold, "length": self.lengths, "eos_rate": self.finished}
        counted = {"content_words_in_post": self.content_words, "kl": self.kl}
        raw = {**sources, **counted, **self.rouge}.get(name)
        if raw is None:
            return None
        values = np.asarray(raw, dtype=np.float64)
        if values.shape != (len(self.texts),):
            raise ValueError(f"{self.name}: {name} has shape {values.shape}, expected ({len(self.texts)},)")
        return np.where([text is None for text in self.texts], np.nan, values)


def diversity_of(answers: Answers) -> dict[str, Interval | None]:
    """`DIVERSITY` of one source's answers, by name; None where fewer than two answers can be measured."""
    worded = [wording(text) for text in answers.texts if text is not None]
    if len(worded) < 2:
        return dict.fromkeys(DIVERSITY)
    repeated, distinct = np.array([each.repetition for each in worded]), distinct_2(worded)
    without = np.array(distinct_2_without(worded))
    measurable = distinct is not None and not np.isnan(without).any()
    return {
        "distinct_2": jackknife(distinct, without) if distinct is not None and measurable else None,
        "repetition": jackknife(repeated.mean(), (repeated.sum() - repeated) / (len(repeated) - 1)),
        "common_opening": jackknife(common_opening(worded), common_opening_without(worded)),
    }


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


def with_content_words(answers: Answers, prompts: Sequence[Prompt], vocabulary: Vocabulary) -> Answers:
    """The same answers with their words that stand in the prompts [n]; NaN where there is no text."""
    counts = [
        np.nan if text is None else float(vocabulary.content_words(prompt.text, text))
        for prompt, text in zip(prompts, answers.texts, strict=True)
    ]
    return Answers(**{**vars(answers), "content_words": counts})


def summarize(
    prompts: Sequence[Prompt],
    sft: Answers,
    policy: Answers | None,
    reference: Answers,
    title: Answers | None,
    baselines: Sequence[Answers] = (),
    *,
    labeller: str,
    metadata: Mapping[str, Any],
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The contents of evaluation.json, from answers to the same n prompts.

    Each of `sft`, `policy`, `title` and `reference` maps every name of `MEASURES` and `DIVERSITY` to
    `{"mean", "low", "high", "n"}` or null.

    - `win_rate_vs_reference` is by the reward model. It is null for the reference itself, and for all where the
      labeller is the reference: a reward model that learnt "closer to the reference is better" cannot say what beats
      it.
    - ROUGE and gold of the reference against itself are null.
    - The policy also has the `WIN_RATES`.
    - `differences.policy_minus_sft` holds paired differences with their p-values `p`. That of gold tells reward hacking
      from progress.
    - Beside a baseline `previous`, the policy also has `VS_PREVIOUS`, its win rates against that one.
    - `differences.policy_minus_NAME` holds the same for each of `baselines`. `kl` of the best of n answers is
      log n - (n - 1) / n, an upper bound (Beirami et al. 2024).
    - `differences.policy_minus_sft_at_equal_length` holds the differences that remain between answers of equal length;
      null where no lengths were measured, or where all pairs differ in length by the same number.

    Args:
        prompts: the n prompts; their `reference` is what ROUGE compares with.
        sft: the SFT model's answers.
        policy: the policy's answers; None before `rl`.
        reference: the people's own answers (text None where there is none).
        title: the posts' titles as answers, a baseline that costs nothing.
        baselines: further models' answers, such as `best_of`, for each prompt the best of several of the SFT model's.
        labeller: the kind of labeller that made the reward model's comparisons.
        metadata: further entries of the record: split, checkpoint paths, seeds.
        samples: resamples of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: answers that do not match the prompts in number, or an infinite measure.
    """
    references = [prompt.reference for prompt in prompts]
    sources = {"sft": sft, **{b.name: b for b in baselines}, "policy": policy, "title": title, "reference": reference}
    present = {name: answers for name, answers in sources.items() if answers is not None}
    for name, answers in present.items():
        if len(answers.texts) != len(prompts):
            raise ValueError(f"{name}: {len(answers.texts)} answers to {len(prompts)} prompts")
        if name != "reference":
            present[name] = with_rouge(answers, references)

    def resampled(statistic: Statistic) -> Statistic:
        return functools.partial(statistic, samples=samples, seed=seed)

    def interval(answers: Answers, measure: str) -> dict[str, float] | None:
        values = answers.measure(measure)
        statistic = share if measure in SHARES else resampled(bootstrap)
        return None if values is None else _as_dict(statistic(values))

    def compare(statistic: Statistic, a: Answers, b: Answers, *measures: str) -> dict[str, float] | None:
        pairs = [answers.measure(measure) for measure in measures for answers in (a, b)]
        arrays = [values for values in pairs if values is not None]
        return _as_dict(statistic(*arrays)) if len(arrays) == len(pairs) else None

    result: dict[str, Any] = {}
    for name, answers in present.items():
        row: dict[str, Any] = {measure: interval(answers, measure) for measure in MEASURES}
        row |= {measure: _as_dict(value) for measure, value in diversity_of(answers).items()}
        meaningful = name != "reference" and labeller != "reference"
        row["win_rate_vs_reference"] = compare(win_rate, answers, reference, "reward") if meaningful else None
        result[name] = row
    for baseline in baselines:
        result[baseline.name]["kl"] = interval(present[baseline.name], "kl")
    if "policy" in present:
        pair = present["policy"], present["sft"]
        at_equal_length = resampled(length_controlled_win_rate)
        result["policy"]["win_rate_vs_sft"] = compare(win_rate, *pair, "reward")
        result["policy"]["lc_win_rate_vs_sft"] = compare(at_equal_length, *pair, "reward", "length")
        result["policy"]["gold_win_rate_vs_sft"] = compare(win_rate, *pair, "gold")
        result["policy"]["gold_lc_win_rate_vs_sft"] = compare(at_equal_length, *pair, "gold", "length")
        if PREVIOUS in present:
            before = present["policy"], present[PREVIOUS]
            measured = zip(VS_PREVIOUS, ("reward", "gold"), strict=True)
            result["policy"] |= {name: compare(win_rate, *before, measure) for name, measure in measured}
        result["policy"]["kl"] = interval(present["policy"], "kl")
        result["differences"] = {
            "policy_minus_sft": {m: compare(resampled(paired_difference), *pair, m) for m in MEASURES},
            "policy_minus_sft_at_equal_length": {
                m: compare(resampled(length_controlled_difference), *pair, m, "length") for m in AT_EQUAL_LENGTH
            },
        }
        for baseline in baselines:
            other = present["policy"], present[baseline.name]
            result["differences"][f"policy_minus_{baseline.name}"] = {
                m: compare(resampled(paired_difference), *other, m) for m in MEASURES
            }
    bootstrap_facts = {"samples": samples, "seed": seed, "confidence": CONFIDENCE, "unit": "prompt"}
    result["metadata"] = {"labeller": labeller, "prompts": len(prompts), "bootstrap": bootstrap_facts, **metadata}
    return result


def samples_table(prompts: Sequence[Prompt], answers: Sequence[Answers]) -> pa.Table:
    """One row for each prompt: `id`, `post`, each source's text in a column of its name, and `MEASURE_SOURCE` columns.

    The measures are `MEASURES` and `kl`; null means that a measure is missing for this prompt.
    """
    references = [prompt.reference for prompt in prompts]
    measured = [source if source.name == "reference" else with_rouge(source, references) for source in answers]
    columns: dict[str, Any] = {"id": [p.id for p in prompts], "post": [p.text for p in prompts]}
    columns |= {source.name: pa.array(source.texts, pa.string()) for source in answers}
    for measure in (*MEASURES, "kl"):
        for source in measured:
            values = source.measure(measure)
            if values is not None:
                columns[f"{measure}_{source.name}"] = pa.array(values, pa.float64(), from_pandas=True)  # NaN is null
    return pa.table(columns)


def write_samples(path: Path, table: pa.Table) -> None:
    """Write samples.parquet by one rename."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def write_evaluation(path: Path, result: Mapping[str, Any]) -> None:
    """Write evaluation.json by one rename; strict JSON.

    Raises:
        ValueError: a number that is not finite.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _as_dict(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)
