"""How many generators a run should have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, Remote
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.groups import Cursor
from rayrlhf.config_file import parse_config
from rayrlhf.config_resources import ScaleConfig
from rayrlhf.errors import UserError
from rayrlhf.runs.scaling import wanted_generators

LIMITS = ScaleConfig(min=2, max=8, target_learner_wait=0.1)


@pytest.mark.parametrize(
    ("count", "learner_wait", "idle", "wanted"),
    [
        (2, 0.5, 0.0, 4),  # half as fast as the learner: twice as many
        (4, 0.2, 0.0, 5),
        (4, 0.9, 0.0, 8),  # as many as there may be
        (4, 0.1, 0.1, 4),  # within the target
        (4, 0.0, 0.2, 4),  # 3.2 have work: three would not do
        (4, 0.0, 0.3, 3),  # 2.8 have work
        (8, 0.0, 0.9, 7),  # one at a time
        (2, 0.0, 1.0, 2),  # no fewer than there have to be
        (4, 0.5, 0.9, 8),  # a learner that waits is what counts
        (1, 0.0, 0.0, 2),
        (12, 0.0, 0.0, 8),
    ],
)  # fmt: skip
def test_by_hand(count: int, learner_wait: float, idle: float, wanted: int) -> None:
    assert wanted_generators(count, learner_wait, idle, LIMITS) == wanted


@given(work=st.floats(0.05, 30.0), start=st.integers(1, 20))
def test_it_settles_where_the_learner_does_not_wait_and_no_generator_is_too_many(work: float, start: int) -> None:
    """Simulated: the learner takes 1 s for what one generator takes `work` seconds for."""
    limits = ScaleConfig(min=1, max=64, target_learner_wait=0.1)
    count = start
    for _ in range(80):
        step = max(1.0, work / count)
        learner_wait, idle = 1.0 - 1.0 / step, 1.0 - work / count / step
        after = wanted_generators(count, learner_wait, idle, limits)
        if after == count:
            break
        count = after
    assert after == count
    assert learner_wait <= 0.1 + 1e-9
    assert count == 1 or work > 0.9 * (count - 1), "fewer would do"


class Actor:
    def ready(self) -> dict[str, str]:
        return {}


def test_the_coordinator_follows_once_a_whole_step_was_of_the_same_generators() -> None:
    scale = {"min": 1, "max": 8, "target_learner_wait": 0.1}
    settings = {"name": "x", "rl": {"max_staleness": 1}, "resources": {"generators": {"scale": scale}}}
    coordinator = Coordinator(parse_config(settings, "test"), "none", 100, 1, local=True)
    pool = coordinator.pools._generators = Pool(
        "generator", 2, lambda name: Remote(name, Actor(), True), start_timeout_s=9, call_timeout_s=9
    )

    def follow(learner_wait: float, idle: float) -> int:
        shares = {f"idle/{worker.name}": idle for worker in pool.workers}
        coordinator._follow_the_learner({"rollout/learner_wait": learner_wait} | shares)
        return pool.wanted

    assert follow(0.5, 0.0) == 2  # the first batch: actors started in it
    assert follow(0.5, 0.0) == 4
    assert follow(0.5, 0.0) == 4  # two are on their way
    pool.admit_ready()
    assert follow(0.5, 0.0) == 4  # they joined in this step
    assert follow(0.0, 0.5) == 3
    pool.apply_size()
    assert follow(0.0, 0.5) == 3
    pool.lose(pool.workers[0], ActorDied("with its node"))
    pool.admit_ready()
    assert follow(0.0, 0.5) == 3  # as many as before, but not the same
    assert follow(0.0, 0.5) == 2


def test_a_pool_that_has_lost_everybody_is_still_one() -> None:
    coordinator = Coordinator(parse_config({"name": "x"}, "test"), "none", 100, 1, local=True)
    pool = coordinator.pools._generators = Pool(
        "generator", 1, lambda name: Remote(name, Actor(), True), start_timeout_s=9, call_timeout_s=9
    )
    pool.lose(pool.workers[0], ActorDied("with its node"))
    status = coordinator.status()
    assert (status.actors, status.wanted, status.replacements) == ({"generator": 0}, {"generator": 1}, {"generator": 1})
    assert coordinator.scale(generators=3) == {"generator": 3}
    coordinator.begin(Cursor(0))
    assert coordinator.reported.deaths == 1
    assert [worker.name for worker in pool.admit_ready()] == ["generator-1", "generator-2", "generator-3"]


def test_in_turn_there_is_nothing_to_follow() -> None:
    settings = {"name": "x", "resources": {"generators": {"scale": {"max": 4}}}}
    with pytest.raises(UserError, match="scale needs rl.max_staleness"):
        parse_config(settings, "test")
    assert parse_config(settings | {"rl": {"max_staleness": 1}}, "test").resources.generators.scale is not None
    settings["resources"]["generators"]["scale"]["min"] = 5  # type: ignore[index]
    with pytest.raises(UserError, match="max must not be below min"):
        parse_config(settings, "test")
