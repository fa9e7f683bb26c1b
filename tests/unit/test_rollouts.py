"""Asynchronous dispatch, with simulated actors: each prompt is trained once and in time, whatever takes how long."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, ActorFailure, Call, Remote
from actors.rollouts.ahead import Ahead
from actors.rollouts.generator import INITIAL_VERSION
from actors.rollouts.groups import Cursor, Group, Limits
from actors.rollouts.in_turn import draw, load_on_all
from actors.rollouts.weight_sync import Publication
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory
from tests.unit.test_dispatch import Pending

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(1.0, 1000, 0)


def weights(version: int) -> Publication:
    return Publication(version, (), (), "")


@dataclass
class Running:
    request: GenerationRequest
    versions: list[int]


class SimulatedGenerator:
    """Writes one token a slice for every request that it holds; a response is as long as its prompt's only id says."""

    def __init__(self, name: str) -> None:
        self.name, self.slices = name, 0
        self.version = -1
        self.running: dict[int, Running] = {}
        self.most = 0

    def ready(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_weights(self, publication: Publication) -> int:
        assert publication.version > self.version
        self.version = publication.version
        return self.version

    def advance(
        self,
        requests: Mapping[int, GenerationRequest],
        sampling: Sampling,
        seconds: float,
        publication: Publication | None = None,
    ) -> dict[int, SerializedTrajectory]:
        if publication:
            self.load_weights(publication)
        assert self.version >= 0
        self.slices += 1
        for ticket, request in requests.items():
            assert ticket not in self.running
            self.running[ticket] = Running(request, [])
        self.most = max(self.most, len(self.running))
        for running in self.running.values():
            running.versions.append(self.version)
        done = {t: r for t, r in self.running.items() if len(r.versions) == r.request.prompt_ids[0]}
        for ticket in done:
            del self.running[ticket]
        return {ticket: SerializedTrajectory.of(trajectory(running)) for ticket, running in done.items()}

    def abort(self) -> None:
        self.running = {}


def trajectory(running: Running) -> Trajectory:
    request, versions = running.request, np.asarray(running.versions, np.int64)
    zeros = np.zeros(len(versions), np.float32)
    prompt = np.asarray(request.prompt_ids, np.int64)
    return Trajectory(
        request.prompt_id, request.sample_index, request.seed, prompt, versions * 0, zeros, versions, "length"
    )


class SimulatedScorer:
    def __init__(self, name: str) -> None:
        self.name, self.sizes = name, list[int]()

    def ready(self) -> dict[str, Any]:
        return {"name": self.name}

    def score_serialized(
        self, trajectories: Sequence[SerializedTrajectory], temperature: float
    ) -> list[SerializedTrajectory]:
        self.sizes.append(len(trajectories))
        unpacked = [serialized.load() for serialized in trajectories]
        for each in unpacked:
            each.rewards = {"length": float(len(each.response_ids))}
        return [SerializedTrajectory.of(each) for each in unpacked]


class Setting:
    """Pools of simulated actors in this process, and the learner's part of the loop."""

    def __init__(
        self,
        lengths: Mapping[int, int],
        *,
        steps: int,
        per_step: int,
        staleness: int,
        samples: int = 2,
        generators: int = 2,
        room: int = 100,
        redraws: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """`redraws` says of how many groups in a row, at each position, the scores are all the same."""
        self.lengths, self.samples, self.redraws = lengths, samples, redraws
        self.limits = Limits(steps, per_step, staleness, generator_requests=room, score_tokens=10)
        self.made: list[SimulatedGenerator] = []

        def spawn(name: str) -> Remote:
            self.made.append(SimulatedGenerator(name))
            return Remote(name, self.made[-1], True)

        self.generators = Pool("generator", generators, spawn, start_timeout_s=1, call_timeout_s=5)
        self.generators.max_replacements = 1000
        self.scorer = SimulatedScorer("scorer-0")
        self.scorers = Pool(
            "scorer", 1, lambda name: Remote(name, self.scorer, True), start_timeout_s=1, call_timeout_s=5
        )
        self.scorers.max_replacements = 1000
        load_on_all(self.generators, weights(10))

    def groups(self, step: int) -> list[list[GenerationRequest]]:
        first = step * self.limits.groups_per_step
        positions = range(first, first + self.limits.groups_per_step)
        return [
            [GenerationRequest(str(p), (self.lengths.get(p, 1),), i, seed=p) for i in range(self.samples)]
            for p in positions
        ]

    def redraw(
        self, position: int, redraws: int, trajectories: Sequence[SerializedTrajectory]
    ) -> list[GenerationRequest] | None:
        assert [t.sample_index for t in trajectories] == list(range(self.samples))
        assert all(t.rewards for t in trajectories)
        assert {t.load().prompt_id for t in trajectories} == {prompt_id(position, redraws)}
        if redraws == self.redraws.get(position, 0):
            return None
        ids = (self.lengths.get(position, 1),)
        return [GenerationRequest(prompt_id(position, redraws + 1), ids, i, seed=position) for i in range(self.samples)]

    def start(
        self,
        step: int = 0,
        version: int = 10,
        cursor: Cursor = Cursor(0),  # noqa: B008
        background: bool = False,
    ) -> Ahead:
        """Just before the batch of `step`, whose weights of `version` have been published."""
        ahead = Ahead(
            self.generators,
            self.scorers,
            self.groups,
            SAMPLING,
            self.limits,
            cursor=cursor,
            background=background,
            timeout_s=10.0,
            redraw=self.redraw,
        )
        ahead.set_weights(weights(version))
        ahead.begin_step(step, version)
        return ahead


def prompt_id(position: int, redraws: int) -> str:
    return f"{position}" + "+" * redraws


def check(
    groups: Sequence[Group], version: int, staleness: int, redraws: Mapping[int, int] = MappingProxyType({})
) -> list[int]:
    """The positions of a batch; complete, in order, not too old, and the last ones to have their positions."""
    for group in groups:
        assert group.redraws == redraws.get(group.position, 0)
        assert [t.sample_index for t in group.trajectories] == list(range(len(group.requests)))
        for each in (serialized.load() for serialized in group.trajectories):
            assert each.prompt_id == prompt_id(group.position, group.redraws)
            assert each.rewards == {"length": float(each.prompt_ids[0])}
            assert (np.diff(each.versions) >= 0).all()
            assert version - staleness <= each.versions.min() and each.versions.max() <= version
    positions = [group.position for group in groups]
    assert positions == sorted(positions)
    return positions


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_prompt_is_trained_once_and_in_time(data: st.DataObject) -> None:
    steps, per_step = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    staleness, restart = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 6))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=steps * per_step, max_size=steps * per_step))
    redraws = data.draw(st.dictionaries(st.integers(0, steps * per_step - 1), st.integers(1, 3), max_size=6))
    setting = Setting(
        dict(enumerate(lengths)),
        redraws=redraws,
        steps=steps,
        per_step=per_step,
        staleness=staleness,
        generators=data.draw(st.integers(1, 3)),
        room=data.draw(st.integers(1, 8)),
    )
    rollouts, version, cursor = setting.start(), 10, Cursor(0)
    trained: list[int] = []
    for step in range(steps):
        if step == restart:  # the learner comes back from its checkpoint, with a version that nobody has had
            rollouts.stop()
            version += 5
            load_on_all(setting.generators, weights(version))
            rollouts = setting.start(step, version, cursor)
        batch = rollouts.take(step, version, 10.0)
        assert len(batch) == per_step
        trained += check(batch, version, staleness, redraws)
        cursor = rollouts.cursor()
        assert set(cursor.untrained).isdisjoint(trained)
        assert set(cursor.untrained) | set(trained) == set(range(cursor.next_step * per_step))
        for _ in range(data.draw(st.integers(0, 10))):  # the learner trains
            rollouts._tick()
            if data.draw(st.integers(0, 20)) == 0:
                deaths = [*setting.generators.workers, *setting.scorers.workers]
                rollouts.dispatcher.lose(data.draw(st.sampled_from(deaths)), ActorDied("simulated"))
            if data.draw(st.integers(0, 8)) == 0:
                setting.generators.scale(data.draw(st.integers(1, 4)))
                setting.scorers.scale(data.draw(st.integers(1, 3)))
        version += 1
        rollouts.set_weights(weights(version))
    assert sorted(trained) == list(range(steps * per_step))


def test_newcomers_get_work_and_leavers_finish_theirs_first() -> None:
    setting = Setting(dict.fromkeys(range(40), 6), steps=5, per_step=8, staleness=1, samples=1, generators=1, room=4)
    rollouts = setting.start()
    rollouts._tick()
    setting.generators.scale(3)
    rollouts._tick()
    assert [len(generator.running) for generator in setting.made] == [4, 4, 4]
    trained = check(rollouts.take(0, 10, 10.0), 10, 1)
    rollouts.set_weights(weights(11))
    rollouts._tick()
    setting.generators.scale(1)
    held = [len(worker.held) for worker in setting.generators.workers]
    assert min(held[1:]) > 0
    for _ in range(8):
        rollouts._tick()
    assert len(setting.generators) == 1 and [generator.running for generator in setting.made[1:]] == [{}, {}]
    assert setting.made[1].version == setting.made[2].version == 11
    for step in range(1, 5):
        trained += check(rollouts.take(step, 10 + step, 10.0), 10 + step, 1)
        rollouts.set_weights(weights(11 + step))
    assert sorted(trained) == list(range(40))


def test_a_long_response_comes_with_a_later_batch_and_no_later_than_it_may() -> None:
    setting = Setting({1: 1000}, steps=6, per_step=4, staleness=3, samples=1)
    rollouts, batches = setting.start(), []
    for step in range(6):
        batches.append(check(rollouts.take(step, 10 + step, 10.0), 10 + step, 3))
        rollouts.set_weights(weights(11 + step))
    assert 0 in batches[0] and all(len(batch) == 4 for batch in batches)
    assert batches[3][0] == 1  # its first token is three versions old by now
    assert sorted(position for batch in batches for position in batch) == list(range(24))


def test_a_batch_leaves_no_more_than_the_next_ones_can_take() -> None:
    """Groups 1 and 2 have tokens of version 10, and there are two batches left that may have such: that of version 11
    waits for one of them, though group 3 is finished."""
    setting = Setting({1: 9, 2: 12}, steps=4, per_step=1, staleness=2, samples=1, generators=1)
    rollouts, batches = setting.start(), []
    for step in range(4):
        if step == 1:
            for _ in range(2):
                rollouts._tick()
            assert set(rollouts.queue.scored) == {3}
        batches.append(check(rollouts.take(step, 10 + step, 10.0), 10 + step, 2))
        rollouts.set_weights(weights(11 + step))
    assert batches == [[0], [1], [2], [3]]


def test_nothing_is_dispatched_further_ahead_than_staleness_allows() -> None:
    setting = Setting({}, steps=9, per_step=4, staleness=2, samples=1)
    rollouts = setting.start()
    for step in range(3):
        for _ in range(20):
            rollouts._tick()
        assert max(rollouts.queue.dispatched) == (step + 3) * 4 - 1
        assert len(rollouts.queue.scored) == 12
        rollouts.take(step, 10 + step, 1.0)
        for _ in range(20):
            rollouts._tick()
        assert max(rollouts.queue.dispatched) == (step + 3) * 4 - 1
        rollouts.set_weights(weights(11 + step))


def test_generators_are_filled_evenly_and_not_beyond_their_room() -> None:
    setting = Setting(dict.fromkeys(range(16), 5), steps=2, per_step=8, staleness=1, samples=2, generators=2, room=6)
    rollouts = setting.start()
    rollouts._tick()
    assert [len(generator.running) for generator in setting.made] == [6, 6]
    for step in range(2):
        check(rollouts.take(step, 10, 10.0), 10, 1)
    assert [generator.most for generator in setting.made] == [6, 6]
    # 32 responses of 5 tokens, 6 at a time on each of two: a place is empty for a slice at most until it is given work.
    assert max(generator.slices for generator in setting.made) <= (5 + 1) * math.ceil(32 / 12)


def test_a_thread_of_its_own_does_the_same_and_gathers_what_is_to_be_scored() -> None:
    setting = Setting({i: 1 + i % 7 for i in range(40)}, steps=4, per_step=10, staleness=1)
    setting.limits = replace(setting.limits, score_tokens=1000)
    rollouts, trained = setting.start(background=True), list[int]()
    for step in range(4):
        trained += check(rollouts.take(step, 10 + step, 10.0), 10 + step, 1)
        rollouts.set_weights(weights(11 + step))
    rollouts.stop()
    assert sorted(trained) == list(range(40))
    assert sum(setting.scorer.sizes) == 80 and len(setting.scorer.sizes) < 20


def test_what_goes_wrong_in_the_thread_is_raised_where_a_batch_is_waited_for() -> None:
    setting = Setting({}, steps=1, per_step=2, staleness=1)
    setting.scorer.sizes = None  # type: ignore[assignment]
    rollouts = setting.start(background=True)
    with pytest.raises(AttributeError, match="append"):
        rollouts.take(0, 10, 10.0)
    rollouts.stop()


def test_a_batch_that_does_not_come_is_an_error_in_time() -> None:
    setting = Setting({0: 10**9}, steps=1, per_step=2, staleness=1)
    with pytest.raises(ActorFailure, match=r"batch of step 0 was not complete within 0 s: 1 of 2 prompts are scored"):
        setting.start().take(0, 10, 0.3)


def test_deaths_beyond_the_limit_are_an_error() -> None:
    setting = Setting({}, steps=1, per_step=2, staleness=1, generators=1)
    setting.generators.max_replacements = 1
    rollouts = setting.start()
    rollouts.dispatcher.lose(setting.generators.workers[0], ActorDied("first"))
    rollouts._tick()  # the newcomer joins
    with pytest.raises(ActorDied, match="second"):
        rollouts.dispatcher.lose(setting.generators.workers[0], ActorDied("second"))


def test_where_the_groups_are() -> None:
    """Slices by hand: one generator with room for two groups of two, two slices a tick, one token a slice."""
    setting = Setting({0: 1, 1: 3, 2: 3, 3: 3}, steps=1, per_step=4, staleness=1, generators=1, room=4)
    rollouts = setting.start(version=10)
    assert rollouts.places() == {"waiting": 0, "generating": 0, "scoring": 0, "scored": 0}
    assert rollouts.versions() == {"generator-0": 10}
    rollouts._tick()  # group 0 is written, group 1 has two of its three tokens
    assert rollouts.places() == {"waiting": 2, "generating": 1, "scoring": 1, "scored": 0}
    rollouts._tick()  # group 0 is scored, group 1 is written, group 2 takes the place of group 0
    assert rollouts.places() == {"waiting": 1, "generating": 1, "scoring": 1, "scored": 1}
    rollouts.set_weights(weights(11))
    rollouts.dispatcher.lose(setting.generators.workers[0], ActorDied("killed"))  # group 2 waits again
    assert rollouts.places() == {"waiting": 2, "generating": 0, "scoring": 1, "scored": 1}
    assert rollouts.versions() == {}
    rollouts._resize()
    assert rollouts.versions() == {"generator-1": INITIAL_VERSION}
    assert [g.position for g in rollouts.take(0, 11, 10.0)] == [0, 1, 2, 3]
    assert rollouts.versions() == {"generator-1": 11}
    assert set(rollouts.places().values()) == {0}


def test_the_coordinator_starts_without_transformers_and_vllm() -> None:
    """They take seconds in each process, and it computes nothing."""
    code = (
        "import sys; import actors.rollouts.coordinator; print({'transformers', 'vllm', 'scipy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_drawing_ends_with_what_is_finished() -> None:
    """A request as long as its prompt says: of 40, in two shares, the short ones are finished by then."""
    setting = Setting({}, steps=1, per_step=1, staleness=0)
    requests = [GenerationRequest(str(length), (length,), 0, seed=length) for length in range(1, 41)]
    done = draw(setting.generators, requests, SAMPLING, 10, lambda: setting.made[0].slices >= 12)
    assert 0 < len(done) < 40
    assert all(done[place].load().prompt_id == requests[place].prompt_id for place in done)
    assert [made.running for made in setting.made] == [{}, {}], "the engines are empty for the next work"
    again = draw(setting.generators, requests, SAMPLING, 10, lambda: False)
    assert sorted(again) == list(range(40)) and all(again[place].data == done[place].data for place in done)


class Slow(SimulatedGenerator):
    """Writes nothing until `stuck` is over, which counts slices."""

    def __init__(self, name: str, stuck: float = math.inf) -> None:
        super().__init__(name)
        self.stuck = stuck

    def advance(self, requests: Mapping[int, GenerationRequest], *args: Any) -> dict[int, SerializedTrajectory]:
        if self.slices >= self.stuck:
            return super().advance(requests, *args)
        self.slices += 1
        self.running |= {ticket: Running(request, []) for ticket, request in requests.items()}
        return {}


class Mortal(Remote):
    """Its actor dies in call number `last` of `advance`."""

    def __init__(self, name: str, target: Any, last: int) -> None:
        super().__init__(name, target, True)
        self.left = last

    def submit_serialized(self, method: str, *args: Any) -> Call:
        self.left -= method == "advance"
        if self.left:
            return super().submit_serialized(method, *args)
        died: Future[Any] = Future()
        died.set_exception(ActorDiedError())
        return Pending(self.name, method, died, False, time.monotonic())


@pytest.mark.parametrize("death", [None, "helper", "straggler"])
@pytest.mark.parametrize("stuck", [5, math.inf])
def test_what_only_a_straggler_holds_is_given_to_the_others_as_well(stuck: float, death: str | None) -> None:
    setting = Setting({}, steps=1, per_step=1, staleness=0, generators=3)
    slow, helper, _ = setting.generators.workers
    setting.made[0] = Slow(slow.name, stuck)
    slow.remote = Remote(slow.name, setting.made[0], True)
    setting.made[0].load_weights(weights(10))
    if death == "straggler":
        slow.remote = Mortal(slow.name, setting.made[0], 8)
    if death == "helper":  # in the first call with what the straggler holds
        helper.remote = Mortal(helper.name, setting.made[1], 1 + 8 + 1)
    for worker in setting.generators.workers:
        worker.busy_s, worker.done = 40.0, 1 if worker is slow else 200
    setting.generators.report_stragglers()
    assert setting.generators.stragglers == [slow]
    requests = [GenerationRequest(str(place), (8,), 0, seed=place) for place in range(12)]
    done = draw(setting.generators, requests, SAMPLING, 10, lambda: False)
    assert {place: each.load().prompt_id for place, each in done.items()} == {p: str(p) for p in range(12)}
    assert setting.generators.deaths == (death is not None)
    living = setting.generators.workers
    assert all(worker.remote._target.running == {} for worker in living), "the engines are empty for the next work"
    assert not any(worker.held or worker.calls for worker in living)
    assert slow.done == 1 or stuck < math.inf
