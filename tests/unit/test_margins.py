"""People are asked first where an earlier reward model is least sure: its config, the order, and what that is worth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from jobs.collect import unranked_answers
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Demonstration
from rayrlhf.errors import UserError
from rayrlhf.rewards.labellers import Unranked, read_unranked
from rayrlhf.rewards.margins import closest_first, margin
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.rounds import asks_as_drawn, round_config
from rayrlhf.runs.starts import find_models
from rayrlhf.trajectory import Trajectory
from tests.rounds import RUN, write_model

TEXTS = {"kind": "python", "name": "mine", "path": "mine.py:score"}
BY_MARGIN = {"labeller": {"kind": "people", "choose": "margin"}}


def test_the_margin_is_that_of_the_best_two() -> None:
    scores = [[0.0, 5.0, 1.0], [2.0, 2.5], [-1.0, -4.0, -1.0], [3.0, 2.5, 9.0, 8.5]]
    assert [margin(own) for own in scores] == [4.0, 0.5, 0.0, 0.5]
    assert closest_first(scores) == [2, 1, 3, 0]


def test_what_is_asked_first_is_what_the_reward_model_knows_least() -> None:
    """An answer's worth and the error of its score are standard normal. Of two answers whose scores differ by m, the
    worths differ by m / 2 on average, with variance 1: so the verdict on them is wrong with probability Phi(-m / 2)."""
    draw = np.random.default_rng(1)
    worth = draw.normal(size=(20_000, 4))
    scores = worth + draw.normal(size=worth.shape)
    best, second = np.argsort(-scores, axis=1)[:, :2].T
    each = np.arange(len(scores))
    wrong = worth[each, best] < worth[each, second]
    expected = norm.cdf(-(scores[each, best] - scores[each, second]) / 2)
    first = closest_first(scores.tolist())[:5000]
    for chosen in (first, each):
        spread = np.sqrt((expected[chosen] * (1 - expected[chosen])).sum()) / len(chosen)
        assert wrong[chosen].mean() == pytest.approx(expected[chosen].mean(), abs=3 * spread)
    # Asked first, 46 of 100 verdicts set the reward model right; as drawn, 32.
    assert (round(expected[first].mean(), 2), round(expected.mean(), 2)) == (0.46, 0.32)


def config(**sections: Any) -> Config:
    return parse_config({"name": "mine", "collect": BY_MARGIN, **sections}, "test")


def test_each_round_asks_by_the_reward_model_of_the_round_before(tmp_path: Path) -> None:
    own = config(rounds={"count": 3})
    first, second, third = (round_config(own, number, RUN) for number in (1, 2, 3))
    assert first.collect.labeller.choose == "random" and first.collect.margin_from is None  # type: ignore[union-attr]
    assert [asks_as_drawn(own, number) for number in (1, 2)] == [True, False]
    assert second.collect.margin_from == f"{RUN}/round-1/reward_model"
    assert third.collect.margin_from == f"{RUN}/round-2/reward_model"
    # One that the run was given is there in the first round, too.
    write_model(tmp_path)
    given = config(rounds={"count": 2}, reward_model={"from": str(tmp_path)})
    assert not asks_as_drawn(given, 1)
    assert find_models(round_config(given, 1, RUN))["collect.margin_from"] == str(tmp_path)
    assert "collect.margin_from" not in find_models(parse_config({"name": "mine"}, "test"))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "choose: margin needs a reward model, which a run has in its second round"),
        ({"rounds": {"count": 2}, "stages": ["sft", "collect", "dpo", "evaluate"]}, "choose: margin needs a reward mo"),
        (
            {"stages": ["sft", "collect", "dpo"], "rewards": [TEXTS], "collect": BY_MARGIN | {"margin_from": "m"}},
            "margin needs a reward of kind model",
        ),
        ({"collect": {"margin_from": "m"}}, "collect.margin_from: nothing reads it"),
    ],
)
def test_without_a_reward_model_it_is_one_line(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        config(**sections)
    assert said in str(raised.value) and "\n" not in str(raised.value)


class Scorers:
    """Stands for generators and scorers: an answer's reward is its first token, negative and doubled by the weight."""

    def __init__(self) -> None:
        self.models: list[str] = []

    def start_scorers(self, prompts: Any, reference: str, *, gold: None, reward_model: str) -> None:
        self.models = [reference, reward_model]

    def score(self, trajectories: list[Trajectory], temperature: float) -> list[Trajectory]:
        for trajectory in trajectories:
            trajectory.rewards = {"helpful": -2.0 * trajectory.response_ids[0], "other": 7.0}
        return trajectories


def test_answers_wait_in_the_order_of_the_margins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = [
        {"kind": "model", "name": "helpful", "weight": -2.0},
        {"kind": "python", "name": "other", "path": "a.py:b"},
    ]
    scorers, run = Scorers(), RunFolder(tmp_path)
    session: Any = SimpleNamespace(
        config=config(rewards=rewards, collect=BY_MARGIN | {"margin_from": "m"}),
        run=run,
        rollouts=scorers,
        data=SimpleNamespace(collect=[Demonstration(id, id, "x") for id in ("sure", "torn", "close")]),
        starts=SimpleNamespace(base="sft", given={"collect.margin_from": "m"}),
    )
    ids = {"sure": ((9,), (1,), (5,)), "torn": ((3,), (3,)), "close": ((4, 8), (1,), (5, 1))}
    drawn = [Unranked(id, id, tuple("abc"[: len(own)]), (0,), own) for id, own in ids.items()]
    monkeypatch.setattr("jobs.collect.sample_answers", lambda *_: (drawn, {}))
    found = unranked_answers(session, [Demonstration("x", "x", "x")], again=True)
    assert [each.id for each in found] == ["torn", "close", "sure"]
    assert read_unranked(run.to_rank) == found
    assert scorers.models == ["sft", "m"]
    said = "by the margin of the best two answers in m, the closest first: 0 to 4, median 1"
    assert said in " ".join(capsys.readouterr().out.split())
    scorers.models = []
    assert unranked_answers(session, [], again=True) == found and not scorers.models, "an interrupted run goes on"
