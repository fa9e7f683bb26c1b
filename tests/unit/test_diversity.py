"""How answers repeat themselves and one another: by hand, and against plain loops."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from actors.rollouts.batch import Batch
from actors.rollouts.groups import Cursor
from rayrlhf.rewards.diversity import (
    common_opening,
    common_opening_without,
    distinct_2,
    distinct_2_without,
    diversity,
    repetition,
    wording,
)
from rayrlhf.trajectory import SerializedTrajectory, Trajectory


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d a b c d", 0.2),  # abcd bcda cdab dabc abcd
        ("No, no, no! No no", 0.5),  # two 4-grams, the same
        ("a b c d e f", 0.0),
        ("кот сидит и ждёт кот сидит и ждёт", 0.2),
        ("größer als ein Haus", 0.0),
        ("a a a", 0.0),  # too short to have any
        ("", 0.0),
    ],
)
def test_repetition_of_an_answer(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_several_answers_by_hand() -> None:
    """2-grams: ab bc cd de, ab bc cd df, xy: 6 different of 9. Two of three begin with a b c d."""
    answers = [wording(text) for text in ("a b c d e", "A b, c d f", "x y")]
    assert distinct_2(answers) == pytest.approx(6 / 9)
    assert common_opening(answers) == pytest.approx(2 / 3)
    assert diversity(answers) == {
        "repetition": 0.0,
        "distinct_2": pytest.approx(6 / 9),
        "common_opening": pytest.approx(2 / 3),
    }


def test_answers_of_single_words() -> None:
    assert diversity([wording("yes"), wording("")]) == {"repetition": 0.0, "common_opening": 0.5}


def test_leaving_one_out_is_measuring_the_others() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abc"), size=rng.integers(2, 9))) for _ in range(20)]
    texts += ["a b c d e"] * 3
    answers = [wording(text) for text in texts]
    others = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    assert distinct_2_without(answers) == [pytest.approx(distinct_2(left)) for left in others]
    assert common_opening_without(answers) == [pytest.approx(common_opening(left)) for left in others]
    # The hashes stand for the words: counted without them.
    pairs = Counter(pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False))
    assert distinct_2(answers) == pytest.approx(len(pairs) / pairs.total())


def test_the_only_commonest_opening_loses_its_place() -> None:
    answers = [wording(text) for text in ("a", "a", "b")]
    assert common_opening_without(answers) == [0.5, 0.5, 1.0]


def trajectory(text: str) -> SerializedTrajectory:
    one = Trajectory(
        "p", 0, 0, np.array([1]), np.array([2]), np.zeros(1, np.float32), np.ones(1, np.int64), "eos", {"r": 0.0}
    )
    one.wording = wording(text)
    return SerializedTrajectory.of(pickle.loads(pickle.dumps(one)))


def test_a_batch_has_them_as_metrics() -> None:
    batch = Batch.of(0, 1, [trajectory("a b c d e"), trajectory("a b c d a b c d")], Cursor(1), 0)
    assert batch.metrics["rl/repetition"] == pytest.approx(0.1)
    assert batch.metrics["rl/distinct_2"] == pytest.approx(5 / 11)  # ab bc cd de da, of 4 + 7
    assert batch.metrics["rl/common_opening"] == 1.0
    assert batch.trajectories[1].wording == wording("a b c d a b c d")
