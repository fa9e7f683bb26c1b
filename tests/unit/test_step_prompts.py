"""Which groups give their places to other prompts, and to which ones (dynamic sampling of DAPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.pools.pool import Pool
from actors.rollouts.groups import Cursor
from actors.rollouts.in_turn import InTurn
from actors.rollouts.step_prompts import StepPrompts
from rayrlhf.config import Config
from rayrlhf.config_rl import GRPOConfig, ReinforcePPConfig
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, replacements_of_step
from rayrlhf.trajectory import FinishReason, GenerationRequest, Sampling, SerializedTrajectory, Trajectory

PROMPTS = [EncodedPrompt(f"p{i}", (i,)) for i in range(7)]


def step_prompts(**changes: Any) -> StepPrompts:
    settings = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_redraws": 2} | changes
    return StepPrompts(PROMPTS, Config(name="a", seed=5, rl=GRPOConfig(**settings)))


def scored(*scores: float, ends: Sequence[FinishReason] = ("eos", "eos")) -> list[SerializedTrajectory]:
    ids, zeros = np.ones(2, np.int64), np.zeros(2, np.float32)
    return [
        SerializedTrajectory.of(
            Trajectory("p", i, 0, ids, ids, zeros, ids, end, rewards={"rule": 0.25 * score, "other": 0.75 * score})
        )
        for i, (score, end) in enumerate(zip(scores, ends, strict=True))
    ]


def test_a_group_without_spread_gives_its_place_to_a_prompt_that_the_step_does_not_have() -> None:
    prompts = step_prompts()
    first = [group[0].prompt_id for group in prompts.groups(1)]
    assert first == [f"p{i}" for i in prompts_of_step(7, 5, 1, 3)]
    later = step_prompts(skip_prompts=3)  # behind a round of one step
    assert [group[0].prompt_id for group in later.groups(0)] == first
    assert later.redraw(0, 0, scored(1, 1))[0].prompt_id not in first  # type: ignore[index]
    once = [prompts.redraw(3 + place, 0, scored(1, 1)) for place in range(3)]
    twice = [prompts.redraw(3 + place, 1, scored(0, 0)) for place in range(3)]
    assert [group[0].prompt_id for group in once if group] == [f"p{i}" for i in replacements_of_step(7, 5, 1, 3, 1)]
    # Seven prompts: three of the step, three of the first redraw, and one is left.
    assert [group is None for group in twice] == [False, True, True]
    everything = [r for group in (*prompts.groups(1), *once, *twice) if group for r in group]
    assert len({r.prompt_id for r in everything}) == 7
    assert len({r.seed for r in everything}) == len(everything) == 14
    assert [r.sample_index for r in everything] == [0, 1] * 7
    assert prompts.redraw(3, 0, scored(1, 1)) == once[0], "a function of its arguments"


def test_groups_that_teach_something_stay_and_so_do_all_after_the_last_redraw() -> None:
    prompts = step_prompts()
    assert prompts.redraw(12, 0, scored(1, 0)) is None
    assert prompts.redraw(12, 2, scored(1, 1)) is None
    assert step_prompts(max_redraws=0).redraw(12, 0, scored(1, 1)) is None


def test_the_score_is_the_one_that_the_learner_sees() -> None:
    """A response that was cut off scores `missing_eos_reward`."""
    prompts = step_prompts()
    assert prompts.redraw(12, 0, scored(1, 1, ends=("eos", "length"))) is None
    assert prompts.redraw(12, 0, scored(1, 0, ends=("length", "length"))) is not None
    assert step_prompts(missing_eos_reward=None).redraw(12, 0, scored(1, 1, ends=("eos", "length"))) is not None


def test_one_sample_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="max_redraws needs samples_per_prompt of 2 or more"):
        ReinforcePPConfig(max_redraws=1)


class Pools:
    """In place of `RolloutPools`; generation and scoring are patched."""

    generators: Pool
    scorers: Pool


def test_in_turn_only_the_places_that_are_free_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores by prompt: p0 and p1 have no spread, the others have."""
    drawn: list[list[str]] = []

    def generate(pool: Any, requests: Sequence[GenerationRequest], *rest: Any) -> list[SerializedTrajectory]:
        drawn.append([request.prompt_id for request in requests])
        one = scored(0, 0)[0].load()
        return [
            SerializedTrajectory.of(replace(one, prompt_id=r.prompt_id, sample_index=r.sample_index)) for r in requests
        ]

    def score(pool: Any, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
        flat = ("p0", "p1")
        return [replace(t, rewards={"r": 0.0 if t.prompt_id in flat else t.sample_index}) for t in trajectories]

    monkeypatch.setattr(Pools, "generators", None, raising=False)
    monkeypatch.setattr(Pools, "scorers", None, raising=False)
    monkeypatch.setattr("actors.rollouts.in_turn.generate", generate)
    monkeypatch.setattr("actors.rollouts.in_turn.score", score)

    def groups_of_step(step: int) -> list[list[GenerationRequest]]:
        return [[GenerationRequest(f"p{place}", (place,), i) for i in range(2)] for place in range(3)]

    def redraw(
        position: int, redraws: int, trajectories: Sequence[SerializedTrajectory]
    ) -> list[GenerationRequest] | None:
        if redraws == 2 or len({t.rewards["r"] for t in trajectories}) > 1:
            return None
        # In the first redraw p1 gives way to p0, which has no spread either.
        prompt = "p0" if (position, redraws) == (13, 0) else f"q{position}"
        return [GenerationRequest(prompt, (position,), i) for i in range(2)]

    rollouts = InTurn(
        Pools(),  # type: ignore[arg-type]
        groups_of_step, Sampling(1.0, 9, 0), cursor=Cursor(0), redraw=redraw,
    )  # fmt: skip
    batch = rollouts.next_batch(4, version=1)
    assert drawn == [["p0", "p0", "p1", "p1", "p2", "p2"], ["q12", "q12", "p0", "p0"], ["q13", "q13"]]
    assert [t.prompt_id for t in batch.trajectories] == ["q12", "q12", "q13", "q13", "p2", "p2"]
    assert batch.redrawn == 3 and batch.cursor == Cursor(5)
