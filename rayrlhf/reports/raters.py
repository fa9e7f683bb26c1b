"""How far those who say which answers are better agree with each other: people, judge, reward model, gold measure.

Each of them is a rater: of two answers to a prompt it prefers one, or calls them equal. A run's folder holds the
verdicts of several raters on the same pairs, and so one table shows how far each can stand in for another. `longer
answer` is a rater, too: whoever agrees with it a lot looks at the length.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.errors import UserError
from rayrlhf.labelling.aggregate import reliabilities
from rayrlhf.labelling.agreement import Agreement, agreement
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.resampling import Interval, clustered_share
from rayrlhf.runs.addresses import as_typed
from rayrlhf.runs.folder import RunFolder, run_at, stored_config
from rayrlhf.runs.labels import labels_to_read
from rayrlhf.runs.reading import read_rows, sound
from rayrlhf.runs.stores import store_errors

GOLD, REWARD_MODEL, REWARDS, LONGER = "gold", "reward model", "sum of rewards", "longer answer"
ANSWERED = ("sft", "best_of", "dpo", "policy")
"""Sources of samples.parquet whose answers are compared: the reference is the yardstick of gold itself."""

Pair = tuple[str, str, str]
"""Id of the prompt, and two different answers, the smaller text first."""
Verdicts = dict[Pair, float]
"""1: the first answer is better; -1: the second; 0: they are equal."""


@dataclass(frozen=True)
class Compared:
    """Two raters on the pairs that both have seen."""

    one: str
    other: str
    alike: Interval | None
    """Share that both order alike, of the pairs that both order; n counts prompts. None if there is no such pair."""
    pairs: int
    """That both order."""
    ties: int
    """That one of them calls equal."""


def agreement_of(addresses: Sequence[str | Path]) -> list[Compared]:
    """Every two raters of one or more runs.

    Runs that have the same answers are compared with each other, such as one in which people ranked and one that took
    its models from it and in which a judge did. A rater is then called by its run, too.

    Raises:
        UserError: a folder is no run's, or no two raters have a pair in common.
    """
    runs = list({run.address: run for run in map(run_at, addresses)}.values())
    names = Counter(run.name for run in runs)
    raters: dict[str, Verdicts] = {}
    for run in runs:
        with store_errors(run.store):
            own = raters_of(run)
        called = run.name if names[run.name] == 1 else as_typed(run.address)  # as the rounds of two runs are
        raters |= own if len(runs) == 1 else {f"{called}: {name}": verdicts for name, verdicts in own.items()}
    found = compare(raters | {LONGER: longer(raters.values())})
    if not any(LONGER not in (each.one, each.other) for each in found):
        said = ", ".join(raters) or "none"
        raise UserError(
            f"agreement: no two raters have a pair of answers in common in {', '.join(run.address for run in runs)} "
            f"(raters: {said}); collect, reward-model and evaluate write what is compared"
        )
    return found


def raters_of(run: RunFolder) -> dict[str, Verdicts]:
    """By name: what each rater of a run says; those who say nothing are left out.

    Raises:
        UserError: it is no run folder.
    """
    if run.read(run.config) is None:
        raise UserError(f"{run.address}: no run folder (it has no config.yaml); `rayrlhf runs DIR` lists those in DIR")
    config = stored_config(run)
    ranked = _rows(run, run.comparisons, "id", "responses", "ranking", "scores", "labeller", "source")
    pairs = _rows(run, run.heldout_pairs, "id", "better", "worse", "reward_model")
    samples = _rows(run, run.samples, "id")
    measures = config.data.comparisons is None and config.collect.labeller.measures
    raters: defaultdict[str, Verdicts] = defaultdict(dict, {GOLD: {}})
    with sound(run.address_of(run.comparisons)):
        for row in ranked:
            _add(raters[GOLD if measures else row["labeller"]], row["id"], row["responses"], _scores(row))
            if row.get("gold"):
                _add(raters[GOLD], row["id"], row["responses"], row["gold"])
    raters |= _labellers(*labels_of(run))
    # The pairs of other runs, such as earlier rounds, are of other answers, even where the prompt is the same.
    texts = {(row["id"], source): row["responses"] for row in ranked for source in (row["source"], run.name)}
    with sound(run.address_of(run.heldout_pairs)):
        for pair in pairs:
            if (answers := texts.get((pair["id"], pair.get("source", "")))) is not None:
                both = [answers[pair["better"]], answers[pair["worse"]]]
                _add(raters[REWARD_MODEL], pair["id"], both, [pair["reward_model"], 0.0])
    alone = len(config.rewards) == 1 and config.rewards[0].trained
    for row in samples:
        sources = [source for source in ANSWERED if row.get(source) is not None]
        for measure, rater in (("gold", GOLD), ("reward", REWARD_MODEL if alone else REWARDS)):
            scores = [row.get(f"{measure}_{source}") for source in sources]
            _add(raters[rater], row["id"], [row[source] for source in sources], scores)
    return {name: verdicts for name, verdicts in raters.items() if verdicts}


def labels_of(run: RunFolder) -> tuple[list[Item], list[Judgement]]:
    """The items and judgements of a run's labels; none where nobody has judged."""
    with labels_to_read(run) as database:
        return (database.items(), database.judgements()) if database else ([], [])


def people_of(run: RunFolder) -> tuple[Agreement, dict[str, float]] | None:
    """The figures of a run's labellers, and their reliability by name; None where nobody has judged."""
    items, judgements = labels_of(run)
    rankings = [judgement for judgement in judgements if judgement.ranks is not None and judgement.repeat == 0]
    return (agreement(judgements, items), reliabilities(rankings)) if judgements else None


def longer(raters: Iterable[Verdicts]) -> Verdicts:
    """The rater that prefers the longer text, in characters, on all pairs that any of these has."""
    pairs = {pair for verdicts in raters for pair in verdicts}
    return {pair: float(np.sign(len(pair[1]) - len(pair[2]))) for pair in pairs}


def compare(raters: Mapping[str, Verdicts]) -> list[Compared]:
    """Every two raters that have a pair in common, with intervals over prompts."""
    found = []
    for (one, ours), (other, theirs) in itertools.combinations(raters.items(), 2):
        common = sorted(ours.keys() & theirs.keys())
        if not common:
            continue
        same = np.array([ours[pair] * theirs[pair] for pair in common])
        prompts = np.array([pair[0] for pair in common])[same != 0]
        ordered = (same[same != 0] + 1) / 2
        alike = clustered_share(ordered, prompts) if len(ordered) else None
        found.append(Compared(one, other, alike, len(ordered), len(common) - len(ordered)))
    return found


def _rows(run: RunFolder, path: Path, *columns: str) -> list[dict[str, Any]]:
    """The rows of a Parquet file of a run; none where it is not there."""
    content = run.read(path)
    return [] if content is None else read_rows(content, run.address_of(path), *columns)


def _scores(row: Mapping[str, Any]) -> Sequence[float]:
    """[K] of a row of comparisons.parquet, higher is better."""
    if row["scores"] is not None:
        return list(row["scores"])
    places = {index: place for place, index in enumerate(row["ranking"])}
    return [-float(places[index]) for index in range(len(places))]


def _labellers(items: Sequence[Item], judgements: Sequence[Judgement]) -> dict[str, Verdicts]:
    """Each labeller by name, if there are several: of one alone, the comparisons are theirs."""
    answers = {item.id: item.answers for item in items}
    found: dict[str, Verdicts] = {}
    for judgement in judgements:
        if judgement.repeat == 0 and judgement.ranks is not None:
            own = found.setdefault(f"people: {judgement.labeller}", {})
            _add(own, judgement.item, answers[judgement.item], [-float(rank) for rank in judgement.ranks])
    return found if len(found) > 1 else {}


def _add(verdicts: Verdicts, prompt: str, answers: Sequence[str], scores: Sequence[float | None]) -> None:
    """Put in what scores [K] say of each two of K answers. Where one has no score, or both are one text: nothing."""
    for (a, x), (b, y) in itertools.combinations(zip(answers, scores, strict=True), 2):
        if a != b and x is not None and y is not None and not math.isnan(x) and not math.isnan(y):
            verdict = float(np.sign(x - y))
            verdicts[(prompt, a, b) if a < b else (prompt, b, a)] = verdict if a < b else -verdict
