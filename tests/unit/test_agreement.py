"""Agreement of labellers against published figures, scipy, nltk and tables made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from nltk.metrics.agreement import AnnotationTask
from scipy import stats

from rayrlhf.labelling.agreement import agreement, alike, alpha, coincidences, ordinal_alpha, signs, tau_b
from rayrlhf.labelling.judgements import Item, Judgement

NONE = -1
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
"""Four observers of twelve units (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C)."""


def random_ranks(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """With ties."""
    return tuple(int(rank) for rank in rng.integers(1, count + 1, count))


def test_alpha_of_the_published_example() -> None:
    """The package `krippendorff` 0.9.0 says the same: 0.8153875."""
    units = [[row[unit] for row in PUBLISHED if row[unit] != NONE] for unit in range(12)]
    table = np.sum([coincidences(np.array(unit)[:, None] - 1, 5) for unit in units if len(unit) > 1], axis=0)
    assert ordinal_alpha(table) == pytest.approx(0.8153875, abs=1e-7)


def test_alpha_of_rankings_equals_nltk() -> None:
    """nltk counts every pair of labels in a loop, with a distance that we look up in the frequencies of the ranks."""
    rng = np.random.default_rng(3)
    rankings = [[random_ranks(rng, 4) for _ in range(people)] for people in (3, 2, 3, 1, 2, 2)]
    labels = [
        (str(person), f"{item} {answer}", float(rank))
        for item, by in enumerate(rankings)
        if len(by) > 1
        for person, ranks in enumerate(by)
        for answer, rank in enumerate(stats.rankdata(ranks))
    ]
    given = [label for _, _, label in labels]

    def distance(a: float, b: float) -> float:
        low, high = sorted((a, b))
        between = sum(low <= label <= high for label in given)
        return (between - (given.count(low) + given.count(high)) / 2) ** 2

    found = alpha(rankings)
    assert found is not None and found.n == 5
    assert found.mean == pytest.approx(AnnotationTask(labels, distance).alpha())
    assert found.low < found.mean < found.high


def test_alpha_is_1_where_all_agree_and_none_where_nothing_can_be_said() -> None:
    same = alpha([[(1, 2, 3), (1, 2, 3)], [(2, 1, 3), (2, 1, 3)]])
    assert same is not None and (same.mean, same.low, same.high) == (1.0, 1.0, 1.0)
    assert alpha([[(1, 2)], [(2, 1)]]) is None, "one ranking each"
    assert alpha([[(1, 1), (1, 1)]]) is None, "one value only"


def test_the_interval_of_alpha_equals_a_naive_bootstrap() -> None:
    """It draws items: alpha of the drawn items, all together."""
    rng = np.random.default_rng(5)
    rankings = [[random_ranks(rng, 3) for _ in range(2)] for _ in range(15)]
    found = alpha(rankings, samples=2000, seed=2)
    naive = [
        alpha([rankings[i] for i in draw], samples=1) for draw in np.random.default_rng(9).integers(0, 15, (400, 15))
    ]
    low, high = np.quantile([each.mean for each in naive if each], [0.025, 0.975])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_tau_b_equals_scipy() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = random_ranks(rng, 5), random_ranks(rng, 5)
        assert tau_b(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, nan_ok=True)


def test_verdicts_on_pairs_by_hand() -> None:
    assert signs((1, 3, 1)).tolist() == [1, 0, -1]
    assert alike((1, 2, 3), (1, 3, 2)).tolist() == [1, 1, 0]
    assert alike((1, 1, 2), (2, 1, 3)).tolist() == [1, 1], "a tie is no preference that could be shared"


ITEMS = [Item("a", "p", ("x", "y", "z")), Item("b", "q", ("x", "y", "z"), gold=(1, 2, 3)), Item("c", "r", ("x", "y"))]


def say(item: str, labeller: str, *ranks: int, shown: tuple[int, ...] = (), **more: float) -> Judgement:
    return Judgement(item, labeller, ranks, shown=shown, **more)  # type: ignore[arg-type]


SAID = [
    say("a", "ann", 1, 2, 3, shown=(2, 1, 0), seconds=10),
    say("a", "bob", 1, 3, 2, shown=(0, 1, 2), seconds=30),
    say("a", "cy", 1, 1, 1),
    say("b", "ann", 1, 2, 3, shown=(0, 1, 2), seconds=20),
    say("b", "bob", 2, 1, 2),
    say("b", "ann", 2, 1, 3, repeat=1, seconds=40),
    Judgement("c", "ann", None, skipped="both are nonsense", seconds=5),
    Judgement("c", "bob", (1, 2), flags=("harmful",)),
    say("elsewhere", "ann", 1, 2),
]


def test_figures_by_hand() -> None:
    found = agreement(SAID, ITEMS)
    assert (found.items, found.shared) == (3, 2)
    # a: ann and bob order xy and xz alike, yz not; cy orders nothing. b: bob orders xy and yz only, xy otherwise.
    everyone, ann, bob = found.everyone, found.labellers["ann"], found.labellers["bob"]
    assert everyone.with_others is not None and everyone.with_others.mean == pytest.approx(3 / 5)
    assert everyone.pairs == 5 and everyone.with_others.n == 2
    assert ann.with_others == bob.with_others == everyone.with_others
    assert found.labellers["cy"].with_others is None and found.labellers["cy"].ties == 1.0
    # ann's repeat of b turns xy round. Her first says as gold does; of bob's two pairs there, xy is the wrong way.
    assert ann.with_self is not None and ann.with_self.mean == pytest.approx(2 / 3) and bob.with_self is None
    assert ann.with_gold is not None and ann.with_gold.mean == 1.0
    assert bob.with_gold is not None and bob.with_gold.mean == pytest.approx(1 / 2)
    # ann on a: all three better answers were shown later; on b: all earlier. bob on a: xy and xz, not zy.
    assert ann.earlier_preferred is not None and ann.earlier_preferred.mean == pytest.approx(3 / 6)
    assert everyone.earlier_preferred is not None and everyone.earlier_preferred.mean == pytest.approx((3 + 2) / 9)
    assert (ann.judged, ann.skipped, ann.flagged, ann.seconds) == (2, 1, 0, 15.0)
    assert (everyone.judged, everyone.skipped, everyone.flagged) == (6, 1, 1)
    # 3 + 3 + 3 + 3 + 3 + 3 + 1 pairs were judged, of which cy tied three and bob one.
    assert everyone.ties == pytest.approx(4 / 19)
    assert found.skipped == {"both are nonsense": 1} and found.flags == {"harmful": 1}
    taus = [stats.kendalltau((1, 2, 3), (1, 3, 2)).statistic, stats.kendalltau((1, 2, 3), (2, 1, 2)).statistic]
    assert found.tau_b is not None and found.tau_b.mean == pytest.approx(np.mean(taus)) and found.tau_b.n == 2
    assert agreement(SAID, ITEMS) == found, "the same again"


def test_the_order_of_the_judgements_does_not_matter_and_none_give_no_figures() -> None:
    found = agreement(SAID[::-1], ITEMS)
    assert found.everyone.with_others is not None and found.everyone.with_others.mean == pytest.approx(3 / 5)
    nothing = agreement([], ITEMS)
    assert nothing.everyone.with_others is None and nothing.alpha is None and nothing.labellers == {}


def test_two_who_flip_coins_agree_on_half_of_the_pairs() -> None:
    rng = np.random.default_rng(0)
    items = [Item(str(i), "p", ("x", "y", "z")) for i in range(400)]
    orders = list(itertools.permutations((1, 2, 3)))
    said = [say(item.id, name, *orders[rng.integers(6)]) for item in items for name in ("ann", "bob")]
    found = agreement(said, items)
    assert found.everyone.with_others is not None and found.alpha is not None
    assert found.everyone.with_others.low < 0.5 < found.everyone.with_others.high
    assert found.alpha.low < 0 < found.alpha.high
