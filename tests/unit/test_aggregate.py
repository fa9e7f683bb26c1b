"""Several rankings become one: by hand, against the equations that the best scores solve, and by known reliability."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq

from rayrlhf.labelling.aggregate import PRECISION, RIGHT, WRONG, aggregate, bradley_terry, majority, reliabilities
from rayrlhf.labelling.agreement import alike
from rayrlhf.labelling.judgements import Judgement
from rayrlhf.rewards.labeller import LabelledRanking

UNKNOWN = RIGHT / (RIGHT + WRONG)


def by_majority(*rankings: tuple[int, ...]) -> tuple[float, ...]:
    return majority(np.array(rankings), np.full(len(rankings), UNKNOWN))


def test_majority_by_hand() -> None:
    assert by_majority((1, 2, 2, 4)) == (3.0, 1.5, 1.5, 0.0), "one labeller's ties stay"
    # x before y twice, y before z twice, x before z three times.
    assert by_majority((1, 2, 3), (1, 3, 2), (2, 1, 3)) == (2.0, 1.0, 0.0)
    assert by_majority((1, 2, 3), (2, 3, 1), (3, 1, 2)) == (1.0, 1.0, 1.0), "a circle is a tie"
    assert by_majority((1, 2), (2, 1)) == (0.5, 0.5)
    assert by_majority((1, 2), (1, 1)) == (1.0, 0.0), "a tie is no vote against"


def test_scores_of_two_answers_solve_their_equation() -> None:
    """Of one ranking by an unknown labeller, in which x is better: s is where its slope is that of the prior."""
    found = bradley_terry(np.array([[1, 2]]), np.array([UNKNOWN]))
    s = brentq(lambda s: 1 / (1 + math.exp(2 * s)) - PRECISION * s, 0, 2)
    assert found == pytest.approx((s, -s), abs=1e-5)


def test_scores_solve_the_equations_of_the_most_probable_ones() -> None:
    """For each answer: its verdicts minus what the scores expect, weighed, is the pull of the prior. A plain loop."""
    rng = np.random.default_rng(4)
    rankings = rng.integers(1, 5, (3, 5))
    reliability = [0.95, 0.7, 0.3]
    weights = [math.log(0.95 / 0.05) / math.log(4), math.log(0.7 / 0.3) / math.log(4), 0.0]
    scores = bradley_terry(rankings, np.array(reliability))
    for i in range(5):
        pull = 0.0
        for ranks, weight in zip(rankings, weights, strict=True):
            for j in range(5):
                if j != i:
                    won = 1.0 if ranks[i] < ranks[j] else 0.5 if ranks[i] == ranks[j] else 0.0
                    pull += weight * (won - 1 / (1 + math.exp(scores[j] - scores[i])))
        assert pull == pytest.approx(PRECISION * scores[i], abs=1e-4)


def test_bradley_terry_keeps_the_order_and_the_ties_of_one_labeller() -> None:
    scores = bradley_terry(np.array([[2, 1, 2, 3, 3, 1]]), np.array([UNKNOWN]))
    assert scores[1] == scores[5] > scores[0] == scores[2] > scores[3] == scores[4]
    even = bradley_terry(np.array([[1, 2, 3], [3, 2, 1]]), np.array([0.9, 0.9]))
    assert even[0] == even[1] == even[2], "two equals who contradict each other"
    uneven = bradley_terry(np.array([[1, 2, 3], [3, 2, 1]]), np.array([0.9, 0.8]))
    assert uneven[0] > uneven[1] > uneven[2], "the more reliable one is followed"


def voters(shares: dict[str, float], items: int) -> tuple[list[Judgement], dict[str, float]]:
    """Labellers of two answers, of which the first is better; each is right by chance, in the share that is known."""
    rng = np.random.default_rng(8)
    right = {name: rng.random(items) < share for name, share in shares.items()}
    said = [Judgement(str(i), name, (1, 2) if right[name][i] else (2, 1)) for i in range(items) for name in shares]
    return said, {name: float(right[name].mean()) for name in shares}


def test_reliability_is_found_without_knowing_which_verdicts_are_right() -> None:
    said, true = voters({"ann": 0.95, "bob": 0.8, "cy": 0.6}, 600)
    assert reliabilities(said) == pytest.approx(true, abs=0.05)


def test_reliabilities_are_where_both_steps_agree() -> None:
    """A plain loop of both steps gives the same shares again."""
    said, _ = voters({"ann": 0.9, "bob": 0.7, "cy": 0.65}, 40)
    share = reliabilities(said, rounds=1000)
    right = dict.fromkeys(share, RIGHT)
    for _, votes in itertools.groupby(said, key=lambda judgement: judgement.item):
        by = {vote.labeller: vote.ranks == (1, 2) for vote in votes}
        first = math.prod(share[name] if vote else 1 - share[name] for name, vote in by.items())
        second = math.prod(1 - share[name] if vote else share[name] for name, vote in by.items())
        for name, vote in by.items():
            right[name] += (first if vote else second) / (first + second)
    assert share == pytest.approx({name: count / (40 + RIGHT + WRONG) for name, count in right.items()}, abs=1e-6)


def test_who_is_never_compared_stays_unknown() -> None:
    assert reliabilities([Judgement("a", "ann", (1, 2, 3)), Judgement("b", "bob", (1, 1))]) == pytest.approx(
        {"ann": UNKNOWN, "bob": UNKNOWN}
    )


def test_who_is_mostly_wrong_makes_no_ties() -> None:
    """dan says the contrary of two others, and then judges an item alone: nothing is known of it."""
    said = [
        Judgement(str(i), name, (2, 1) if name == "dan" else (1, 2))
        for i in range(40)
        for name in ("ann", "bob", "dan")
    ]
    said.append(Judgement("alone", "dan", (1, 2)))
    assert aggregate(said, "bradley_terry").reliability["dan"] < 0.5
    scores = aggregate(said, "bradley_terry").scores
    assert all(math.isnan(score) for score in scores["alone"]) and scores["0"][0] > scores["0"][1]
    assert LabelledRanking.by(scores["alone"]).unknown, "collect leaves it out and counts it"
    assert aggregate(said, "majority").scores["alone"][0] > aggregate(said, "majority").scores["alone"][1]


def test_weights_help_where_one_labeller_is_better_than_two() -> None:
    """Rankings of four answers by their true values and noise, of which ann has little."""
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(100, 4))
    said = [
        Judgement(str(i), name, tuple(int(r) for r in (-(truth[i] + rng.normal(0, noise, 4))).argsort().argsort() + 1))
        for i in range(100)
        for name, noise in (("ann", 0.2), ("bob", 3.0), ("cy", 3.0))
    ]

    def right(method: str) -> float:
        found = aggregate(said, method)
        return float(np.mean(np.concatenate([
            alike(-np.array(found.scores[str(i)]), -truth[i]) for i in range(100)
        ])))  # fmt: skip

    assert right("bradley_terry") > right("majority") + 0.04


def test_repeats_and_skips_have_no_vote_and_the_order_of_writing_does_not_matter() -> None:
    said = [
        Judgement("a", "ann", (1, 2)),
        Judgement("a", "ann", (2, 1), repeat=1),
        Judgement("a", "bob", None, skipped="unsure"),
        Judgement("b", "bob", None, skipped="unsure"),
        Judgement("c", "bob", (2, 1)),
        Judgement("c", "ann", (2, 1)),
    ]
    for method in ("majority", "bradley_terry"):
        found = aggregate(said, method)
        assert set(found.scores) == {"a", "c"} and found.scores["a"][0] > found.scores["a"][1]
        assert found == aggregate(said[::-1], method)
