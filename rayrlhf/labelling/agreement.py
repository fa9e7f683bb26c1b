"""How far people agree: with each other, with themselves and with known ranks; together and labeller by labeller.

A ranking of K answers has a verdict on each of its K (K - 1) / 2 pairs: one answer is better, or they tie. Two rankings
agree on a pair if both have the same answer better; a pair that either of them ties counts for neither side, as it is
no preference that could be shared or denied. So chance is one half, whatever the number of ties.

All intervals are over whole items: what is hard in a prompt is hard in all of its pairs. Those of shares are score
intervals, the others draw items with replacement.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.resampling import CONFIDENCE, Array, Interval, cluster_bootstrap, clustered_share

PUBLISHED = (0.726, 0.015)
"""Agreement of InstructGPT's labellers with each other, and its standard error (Ouyang et al. 2022, section 3.4)."""

Pairs = list[tuple[str, Array]]
"""Items, each with a number for each pair of answers that counts; an item may be there several times."""


@dataclass(frozen=True)
class Figures:
    """What is known of one labeller, or of all together. None where nothing was measured."""

    judged: int
    """Items that were ranked; of all together, judgements."""
    skipped: int
    flagged: int
    ties: float | None
    """Share of the pairs that were called equal."""
    with_others: Interval | None
    """Share of pairs that two labellers order alike, of those that both order; n counts items."""
    pairs: int
    """Verdicts that `with_others` compares."""
    with_self: Interval | None
    """The same of the first judgement and its repeat, by the same labeller."""
    with_gold: Interval | None
    """The same of a judgement and the known ranks of a gold item."""
    earlier_preferred: Interval | None
    """Share of the ordered pairs in which the answer that was shown earlier is the better one; one half without a
    position bias."""
    seconds: float | None
    """Median time for an item, seconds."""


@dataclass(frozen=True)
class Agreement:
    """Of all judgements of a run."""

    everyone: Figures
    labellers: Mapping[str, Figures]
    """By name, sorted."""
    items: int
    """With a ranking at least."""
    shared: int
    """Ranked by two labellers at least."""
    tau_b: Interval | None
    """Kendall's rank correlation with ties, a mean over pairs of labellers on an item; n counts items."""
    alpha: Interval | None
    """Krippendorff's alpha of the ranks, ordinal: 1 is full agreement, 0 that of chance."""
    skipped: Mapping[str, int]
    """Judgements by the reason why they were skipped."""
    flags: Mapping[str, int]
    """Judgements by what was flagged: `harmful` counts one with `harmful:0` and `harmful:prompt` once."""


def agreement(judgements: Sequence[Judgement], items: Sequence[Item], samples: int = 1000, seed: int = 0) -> Agreement:
    """The figures of judgements, of which there is one a labeller, item and repeat. Those on other items do not count.

    Args:
        judgements: as `LabelDatabase.judgements` has them.
        items: that were to be ranked.
        samples: resamples of the bootstrap, of tau-b and alpha.
        seed: of the bootstrap; equal judgements and seed give equal intervals.
    """
    known = {item.id: item for item in items}
    judged = [judgement for judgement in judgements if judgement.item in known]
    firsts: dict[str, dict[str, Judgement]] = defaultdict(dict)
    for judgement in judged:
        if judgement.ranks is not None and judgement.repeat == 0:
            firsts[judgement.item][judgement.labeller] = judgement
    names = sorted({judgement.labeller for judgement in judged})

    def figures(own: set[str]) -> Figures:
        mine = [judgement for judgement in judged if judgement.labeller in own]
        others = [
            (item, alike(_ranks(a), _ranks(b)))
            for item, by in firsts.items()
            for a, b in itertools.combinations(by.values(), 2)
            if own & {a.labeller, b.labeller}
        ]
        rankings = [judgement for judgement in mine if judgement.ranks is not None]
        verdicts = [signs(_ranks(judgement)) for judgement in rankings]
        seconds = [judgement.seconds for judgement in mine if judgement.seconds > 0]
        return Figures(
            judged=len([judgement for judgement in rankings if judgement.repeat == 0]),
            skipped=len(mine) - len(rankings),
            flagged=len([judgement for judgement in mine if judgement.flags]),
            ties=float(np.mean(np.concatenate(verdicts) == 0)) if verdicts else None,
            with_others=_over_items(others, clustered_share),
            pairs=sum(len(values) for _, values in others),
            with_self=_over_items(_repeats(rankings), clustered_share),
            with_gold=_over_items(_golds(rankings, known), clustered_share),
            earlier_preferred=_over_items(
                [(j.item, earlier_preferred(j)) for j in rankings if j.shown], clustered_share
            ),
            seconds=float(np.median(seconds)) if seconds else None,
        )

    drawn = partial(cluster_bootstrap, samples=samples, seed=seed)
    taus = [
        (item, np.array([tau_b(_ranks(a), _ranks(b))]))
        for item, by in firsts.items()
        for a, b in itertools.combinations(by.values(), 2)
    ]
    rows = [[_ranks(judgement) for judgement in by.values()] for by in firsts.values()]
    return Agreement(
        everyone=figures(set(names)),
        labellers={name: figures({name}) for name in names},
        items=len(firsts),
        shared=sum(len(by) > 1 for by in firsts.values()),
        tau_b=_over_items([(item, value) for item, value in taus if not np.isnan(value).any()], drawn),
        alpha=alpha(rows, samples, seed),
        skipped=Counter(judgement.skipped for judgement in judged if judgement.ranks is None),
        flags=Counter(kind for judgement in judged for kind in {flag.partition(":")[0] for flag in judgement.flags}),
    )


def signs(ranks: ArrayLike) -> Array:
    """[K (K - 1) / 2] of each pair (i < j): 1 where answer i is better, -1 where j is, 0 for a tie.

    >>> signs([1, 3, 1]).tolist()
    [1.0, 0.0, -1.0]
    """
    given = np.asarray(ranks, dtype=np.float64)
    first, second = np.triu_indices(len(given), 1)
    return np.sign(given[second] - given[first])


def alike(a: ArrayLike, b: ArrayLike) -> Array:
    """Of each pair that both rankings order: 1 where they order it alike, else 0."""
    one, other = signs(a), signs(b)
    ordered = one * other
    return (ordered[ordered != 0] + 1) / 2


def tau_b(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b of two rankings with ties; NaN where one of them ties all.

    It is the cosine of their verdicts on all pairs.

    Source: Kendall 1945, The treatment of ties in ranking problems.
    """
    one, other = signs(a), signs(b)
    lengths = np.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / lengths if lengths else float("nan")


def earlier_preferred(judgement: Judgement) -> Array:
    """Of each pair that the judgement orders: 1 where the better answer was shown earlier, else 0."""
    places = np.argsort(judgement.shown)  # of each answer, in the order of the item
    return alike(_ranks(judgement), places)


def alpha(
    rankings: Sequence[Sequence[Sequence[int]]], samples: int = 1000, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval | None:
    """Krippendorff's alpha (ordinal) of the ranks of all answers, with a bootstrap interval over items.

    None where no item has two rankings, or where all ranks are the same. A unit is an answer, and its value its rank.
    Ranks that tie have their mean, so that a tie at the top leaves the last rank what it was.

    The coincidences of an item do not depend on the others, so a resample only adds up other ones. A package that
    starts from the ratings would count them anew each time.

    Args:
        rankings: items, each with its rankings [K] by different labellers; items may differ in K.
        samples: resamples.
        seed: of them.
        confidence: of the interval.
    """
    from scipy.stats import rankdata  # it takes time, and actors only hold labellers

    shared = [rankdata(item, axis=-1) for item in rankings if len(item) > 1]
    if not shared:
        return None
    values, codes = np.unique(np.concatenate([np.ravel(item) for item in shared]), return_inverse=True)
    tables = np.split(codes, np.cumsum([np.size(item) for item in shared])[:-1])
    by_item = np.stack(
        [coincidences(table.reshape(np.shape(item)), len(values)) for table, item in zip(tables, shared, strict=True)]
    )
    n = len(shared)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), samples)
    drawn = ordinal_alpha((weights @ by_item.reshape(n, -1)).reshape(samples, len(values), len(values)))
    estimate = float(ordinal_alpha(by_item.sum(axis=0)))
    if np.isnan(estimate):
        return None
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high), n)


def coincidences(ratings: ArrayLike, values: int) -> Array:
    """[V, V] how often two raters gave a unit the values c and k, each unit with the weight 1 / (raters - 1).

    Args:
        ratings: [raters >= 2, units] numbers of the values, from 0.
        values: V.
    """
    given = np.asarray(ratings)
    counts = (given[:, :, None] == np.arange(values)).sum(axis=0)  # [units, V]
    return (counts.T @ counts - np.diag(counts.sum(axis=0))) / (len(given) - 1)


def ordinal_alpha(table: Array) -> Array:
    """Krippendorff's alpha of coincidences [..., V, V], whose values are in their order; NaN where all are one value.

    The distance of two values is the number of ratings between them, with half of those at either.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section E.
    """
    of_value = table.sum(axis=-1)
    middle = np.cumsum(of_value, axis=-1) - of_value / 2
    distance = (middle[..., :, None] - middle[..., None, :]) ** 2
    total = of_value.sum(axis=-1)
    observed = (table * distance).sum(axis=(-2, -1))
    expected = (of_value[..., :, None] * of_value[..., None, :] * distance).sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (total - 1) * observed / np.where(expected == 0, np.nan, expected)


def _ranks(judgement: Judgement) -> tuple[int, ...]:
    assert judgement.ranks is not None
    return judgement.ranks


def _repeats(rankings: Iterable[Judgement]) -> Pairs:
    """Each repeat beside the first judgement of the same labeller and item."""
    given = {(j.labeller, j.item, j.repeat): j for j in rankings}
    return [
        (item, alike(_ranks(given[labeller, item, 0]), _ranks(again)))
        for (labeller, item, repeat), again in given.items()
        if repeat > 0 and (labeller, item, 0) in given
    ]


def _golds(rankings: Iterable[Judgement], items: Mapping[str, Item]) -> Pairs:
    return [
        (j.item, alike(_ranks(j), gold)) for j in rankings if j.repeat == 0 and (gold := items[j.item].gold) is not None
    ]


def _over_items(pairs: Pairs, mean: Callable[[ArrayLike, ArrayLike], Interval]) -> Interval | None:
    """The mean over all pairs with its interval over items; None without any pair."""
    values = np.concatenate([values for _, values in pairs]) if pairs else np.empty(0)
    if not len(values):
        return None
    return mean(values, np.repeat([item for item, _ in pairs], [len(own) for _, own in pairs]))
