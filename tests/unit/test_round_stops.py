"""When no further round begins, and the measures of a round that are shown."""

from __future__ import annotations

import numpy as np
import pytest

from rayrlhf.reports.round_measures import RoundResult, heldout_by_round, reason_to_stop
from tests.rounds import evaluation, interval, pairs, results


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([(0.7, 0.1, 0.1)], None),
        ([(0.51, 0.1, 0.1)], None),
        ([(0.7, 0.1, 0.1), (0.51, 0.1, 0.1)], None),
        ([(0.51, 0.1, 0.1), (0.7, 0.1, 0.1), (0.49, 0.1, 0.1)], None),
        ([(0.7, 0.1, 0.1), (0.51, 0.1, 0.1), (0.49, 0.1, 0.1)], "in rounds 2 and 3 the interval"),
        ([(0.51, 0.1, 0.1), (0.49, 0.1, 0.1)], "in rounds 1 and 2 the interval"),
        ([(0.3, 0.1, 0.1), (0.3, 0.1, 0.1)], None),  # it gets worse, clearly: that is no win rate of chance
        ([(0.7, 0.1, 0.1), (0.7, -0.1, 0.1)], "gold fell by 0.100 in round 2 while the reward rose by 0.100"),
        ([(0.7, -0.1, 0.1)], "gold fell by 0.100 in round 1"),
        ([(0.7, -0.01, 0.1)], None),  # its interval includes 0
        ([(0.7, -0.1, 0.01)], None),
        ([(0.7, -0.1, -0.1)], None),
    ],
)
def test_when_no_further_round_begins(rounds: list[tuple[float, float, float]], said: str | None) -> None:
    found = reason_to_stop(results(*rounds))
    assert found is None if said is None else found is not None and found.startswith(said)


def test_without_gold_the_reward_decides_who_wins() -> None:
    bare = evaluation(2, 0.7, 0.1, 0.1)
    del bare["policy"]["gold_win_rate_vs_previous"], bare["differences"]["policy_minus_previous"]["gold"]
    result = RoundResult(2, bare, {})
    assert result.win_rate("previous") == interval(0.9) and reason_to_stop([result]) is None


def test_accuracy_and_confidence_by_round_against_hand_computation() -> None:
    three = float(np.log(3))  # sigmoid is 3/4
    new = [(0, "round-2", three), (0, "round-2", -three), (1, "round-2", three)]
    found = heldout_by_round(pairs([*new, (2, "round-1", 0.0), (3, "other", 9.0)]), 2)
    assert sorted(found) == [1, 2]
    assert found[2].accuracy["mean"] == pytest.approx(2 / 3) and found[2].accuracy["n"] == 2
    assert found[2].confidence == pytest.approx(0.75)
    assert (found[1].accuracy["mean"], found[1].confidence) == (0.5, 0.5), "a tie counts half"
    # The first round's comparisons stand alone, and their source has no name.
    assert heldout_by_round(pairs([(0, "", 1.0), (1, "", 2.0)]), 1)[1].accuracy["mean"] == 1.0
