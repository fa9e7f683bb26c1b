"""Generation in turn, with simulated actors: every request is drawn once, and again only if it was lost unfinished."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, ActorFailure, Call, Remote
from actors.rollouts.in_turn import generate
from actors.rollouts.weight_sync import WeightSyncError
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory

SAMPLING = Sampling(1.0, 1000, 0)
VERSION = 7


class Answered(Call):
    """A call whose `ref` is the future of its answer."""

    def future(self) -> Future[Any]:
        assert isinstance(self.ref, Future)
        return self.ref


class Simulated(Remote):
    """Writes a token a slice for each of its requests, as many as the prompt's only id says; dies in a given slice."""

    def __init__(self, name: str, dies_at: int | None, version: int) -> None:
        super().__init__(name, None, False)
        self.dies_at, self.version, self.slices = dies_at, version, 0
        self.given: list[list[int]] = []
        """Tickets of each call that brought any."""
        self.handed_over: list[int] = []
        self.written: dict[int, int] = {}
        self.requests: dict[int, GenerationRequest] = {}

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self, method)(*args))
        except ActorDiedError as death:
            future.set_exception(death)
        return Answered(self.name, method, future, False, time.monotonic())

    def submit_serialized(self, method: str, *args: Any) -> Call:
        return self.submit(method, *args)

    def kill(self) -> None:
        pass

    def ready(self) -> dict[str, Any]:
        return {"name": self.name}

    def advance(
        self, requests: Mapping[int, GenerationRequest], sampling: Sampling, seconds: float
    ) -> dict[int, SerializedTrajectory]:
        if self.slices == self.dies_at:
            raise ActorDiedError
        self.slices += 1
        if requests:
            self.given.append(sorted(requests))
        assert not self.requests.keys() & requests.keys()
        self.requests |= requests
        self.written |= dict.fromkeys(requests, 0)
        for ticket in self.written:
            self.written[ticket] += 1
        done = [ticket for ticket, tokens in self.written.items() if tokens == self.requests[ticket].prompt_ids[0]]
        self.handed_over += done
        for ticket in done:
            del self.written[ticket]
        return {ticket: trajectory(self.requests.pop(ticket), self.version) for ticket in done}

    def abort(self) -> None:
        self.requests, self.written = {}, {}


def trajectory(request: GenerationRequest, version: int) -> SerializedTrajectory:
    length = request.prompt_ids[0]
    ids, zeros = np.full(length, request.seed), np.zeros(length, np.float32)
    prompt, versions = np.asarray(request.prompt_ids), np.full(length, version)
    return SerializedTrajectory.of(
        Trajectory(request.prompt_id, request.sample_index, request.seed, prompt, ids, zeros, versions, "length")
    )


def requests_of(lengths: list[int]) -> list[GenerationRequest]:
    return [GenerationRequest(str(i), (length,), seed=100 + i) for i, length in enumerate(lengths)]


class Setting:
    """A pool of simulated generators; `deaths` says who of them dies in which slice, newcomers included."""

    def __init__(self, generators: int, deaths: Mapping[int, int] | None = None, version: int = VERSION) -> None:
        self.made: list[Simulated] = []

        def spawn(name: str) -> Remote:
            self.made.append(Simulated(name, (deaths or {}).get(len(self.made)), version))
            return self.made[-1]

        self.pool = Pool("generator", generators, spawn, start_timeout_s=5, call_timeout_s=5)
        self.pool.max_replacements = 1000

    def generate(self, lengths: list[int]) -> list[SerializedTrajectory]:
        return generate(self.pool, requests_of(lengths), SAMPLING, VERSION)


def assert_drawn(found: list[SerializedTrajectory], lengths: list[int]) -> None:
    assert [(t.written_tokens, t.load().seed) for t in found] == [(n, 100 + i) for i, n in enumerate(lengths)]


def test_each_generator_has_its_neighbours_from_the_start() -> None:
    setting = Setting(3)
    lengths = [3, 1, 2, 5, 1, 1, 4]
    assert_drawn(setting.generate(lengths), lengths)
    assert [actor.given for actor in setting.made] == [[[0, 1, 2]], [[3, 4, 5]], [[6]]]
    assert setting.generate([]) == []


def test_only_what_was_unfinished_is_drawn_again_by_all_the_others() -> None:
    # Slice by slice, generator-0 hands over requests 0 and 1, and dies in its fourth slice, with 2 to 5 unfinished.
    setting = Setting(3, {0: 3})
    lengths = [1, 2, 9, 9, 9, 9, *[9] * 12]
    assert_drawn(setting.generate(lengths), lengths)
    assert setting.made[0].handed_over == [0, 1]
    again = [share for actor in setting.made[1:] for share in actor.given if min(share) < 6]
    assert sorted(again) == [[2, 3], [4, 5]], "in equal shares, those finished not again"
    assert setting.pool.deaths == 1 and len(setting.pool) == 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=12),
    st.integers(1, 4),
    st.dictionaries(st.integers(0, 5), st.integers(0, 12), max_size=6),
)
def test_whoever_dies_each_request_is_finished_once(
    lengths: list[int], generators: int, deaths: dict[int, int]
) -> None:
    setting = Setting(generators, deaths)
    assert_drawn(setting.generate(lengths), lengths)
    finished = sorted(ticket for actor in setting.made for ticket in actor.handed_over)
    assert finished == list(range(len(lengths)))


def test_another_version_is_refused_by_name_and_nothing_stays_behind() -> None:
    setting = Setting(2, version=VERSION - 1)
    with pytest.raises(WeightSyncError, match=f"^generator-0 has version 6, wanted is {VERSION}: sync it first$"):
        setting.generate([1, 5, 5, 5])
    assert [actor.requests for actor in setting.made] == [{}, {}]


def test_one_that_answers_but_does_not_get_on_is_named() -> None:
    setting = Setting(2)
    setting.pool.call_timeout_s = 0.3
    started = time.monotonic()
    with pytest.raises(ActorFailure, match=r"^generator-1.advance did not answer within 0 s"):
        setting.generate([1, 10**9])
    assert time.monotonic() - started > 0.3
    assert setting.made[1].requests == {}


def test_too_many_deaths_end_it() -> None:
    setting = Setting(2, dict.fromkeys(range(9), 0))
    setting.pool.max_replacements = 3
    with pytest.raises(ActorDied, match="generator-. died during advance: "):
        setting.generate([1, 2, 3])
    assert setting.pool.deaths == 5


def test_a_newcomer_has_the_weights_before_its_work() -> None:
    setting = Setting(1, {0: 2})
    brought: list[tuple[str, int]] = []
    setting.pool.on_new = lambda worker: brought.append((worker.name, len(setting.made[-1].given)))
    lengths = [1, 4, 4]
    assert_drawn(setting.generate(lengths), lengths)
    assert brought == [("generator-1", 0)]
    assert setting.made[1].given == [[1, 2]]
