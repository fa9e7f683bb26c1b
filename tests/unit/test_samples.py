"""Samples that are kept when a stage ends before it is done, and the command that goes on with them."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.pools.remote import ActorFailure, Call
from actors.rollouts.coordinator_link import CoordinatorLink, Setup
from jobs.rollouts import RolloutClient
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.samples import KeptSamples, forget_samples
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

TINY = resolve_model("embedded:opt-tiny")
TOKENIZER = load_tokenizer(TINY)
PROMPTS = [EncodedPrompt(f"p{i}", (5, 6 + i)) for i in range(6)]
SAMPLING = Sampling(1.0, 8, 2, min_tokens=1)


def drawn(request: GenerationRequest, version: int, **more: Any) -> Trajectory:
    """A function of the request's seed."""
    random = np.random.default_rng(request.seed)
    length = int(random.integers(1, 6))
    return Trajectory(
        request.prompt_id, request.sample_index, request.seed, np.array(request.prompt_ids),
        random.integers(3, 90, length), -random.random(length).astype(np.float32), np.full(length, version), "eos",
        **more,
    )  # fmt: skip


def plain(trajectory: Trajectory) -> Any:
    """Everything but the version, to compare."""
    values = vars(trajectory) | {"versions": len(trajectory.versions)}
    return {
        name: (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run"))
    folder.path.mkdir()
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def test_samples_come_back_as_they_were(run: RunFolder, model: Path) -> None:
    requests = [GenerationRequest("a", (4, 5), i, seed=10 + i) for i in range(3)]
    kept = KeptSamples(run, model, requests, SAMPLING)
    assert kept.read(1) == {}
    minimum = SAMPLING.minimum
    whole = drawn(requests[0], 1, minimum=minimum)
    played = drawn(requests[2], 1, minimum=minimum, turns=2, environment_reward=0.5)
    played = replace(played, response_ids=np.append(played.response_ids, 7), finish_reason="length")
    played.written = np.append(np.ones(len(played.versions), np.bool_), False)
    kept.write({0: whole, 2: played})
    found = KeptSamples(run, model, requests, SAMPLING).read(7)
    assert {place: plain(t) for place, t in found.items()} == {0: plain(whole), 2: plain(played)}
    assert {int(version) for t in found.values() for version in t.versions} == {7}
    forget_samples(run)
    assert kept.read(1) == {} and not list(run.path.iterdir())


def newer_weights(model: Path) -> dict[str, Any]:
    os.utime(model / "model.safetensors", (1, 1))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        newer_weights,
        lambda model: {"sampling": replace(SAMPLING, temperature=0.5)},
        lambda model: {"requests": [GenerationRequest("a", (4, 5), 0, seed=11)]},
        lambda model: {"requests": [GenerationRequest("a", (4, 6), 0, seed=10)]},
        lambda model: {"others": [{"path": "game.py"}]},
    ],
)
def test_whatever_decides_the_samples_draws_them_anew(
    run: RunFolder, model: Path, change: Callable[[Path], dict[str, Any]]
) -> None:
    requests = [GenerationRequest("a", (4, 5), 0, seed=10)]
    KeptSamples(run, model, requests, SAMPLING).write({0: drawn(requests[0], 1)})
    assert list(KeptSamples(run, model, requests, SAMPLING).read(1)) == [0]
    asked: dict[str, Any] = {"requests": requests, "sampling": SAMPLING, "others": []} | change(model)
    assert KeptSamples(run, model, asked["requests"], asked["sampling"], *asked["others"]).read(1) == {}


def test_a_damaged_file_counts_as_none(run: RunFolder, model: Path) -> None:
    requests = [GenerationRequest("a", (4, 5), 0, seed=10)]
    kept = KeptSamples(run, model, requests, SAMPLING)
    kept.write({0: drawn(requests[0], 1)})
    (file,) = run.path.glob("sampling/*")
    whole = file.read_bytes()
    reason = whole.index(b"eos")  # a bit of it changes, and it is still a text
    for damaged in (whole[:-5], whole[:reason] + b"eor" + whole[reason + 3 :]):
        assert kept.read(1).keys() == {0}
        file.write_bytes(damaged)
        assert kept.read(1) == {}
        file.write_bytes(whole)


class Generators:
    """A coordinator that draws one sample after the other, and in the middle of it the command gets Ctrl-C."""

    local = True

    def __init__(self, interrupted_after: int | None) -> None:
        self.interrupted_after = interrupted_after
        self.asked: list[GenerationRequest] = []
        self.stop = threading.Event()

    def submit(self, method: str, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> Call:
        assert method == "draw"
        found: list[Trajectory | None] = []
        for request in requests:
            self.asked.append(request)
            if len(self.asked) == self.interrupted_after:
                os.kill(os.getpid(), signal.SIGINT)
                assert self.stop.wait(10)
            found.append(None if self.stop.is_set() else drawn(request, version, minimum=sampling.minimum))
        return Call("coordinator", method, found, True, 0.0)

    def submit_beside(self, group: str, method: str) -> Call:
        assert (group, method) == ("control", "stop_drawing")
        self.stop.set()
        return Call("coordinator", method, None, True, 0.0)


def client(run: RunFolder, model: Path, generators: Generators) -> RolloutClient:
    config = parse_config({"name": "a", "data": {"min_response_tokens": 1}}, "test")
    found = RolloutClient(config, SimpleNamespace(run=run), TOKENIZER, local=True)  # type: ignore[arg-type]
    found._link, found._model = CoordinatorLink(generators, Setup(), config), model  # type: ignore[arg-type]
    return found


def test_the_same_command_draws_what_is_missing(
    run: RunFolder, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(folder: RunFolder, generators: Generators, version: int) -> list[Trajectory]:
        own = client(folder, model, generators)
        return own.generate(PROMPTS, own.config.collect, version, "collect", samples=2)

    undisturbed = Generators(None)
    other = RunFolder(str(tmp_path / "other"))
    wanted = samples(other, undisturbed, 1)
    first = Generators(interrupted_after=5)
    with pytest.raises(KeyboardInterrupt):
        samples(run, first, 1)
    assert "stopping: collect keeps the samples that are finished; Ctrl-C again ends it now" in capsys.readouterr().out
    second = Generators(None)
    found = samples(run, second, 3)
    assert "4 of 12 samples are there from an earlier start" in capsys.readouterr().out
    assert second.asked == undisturbed.asked[4:]
    assert [plain(t) for t in found] == [plain(t) for t in wanted]

    class Failing(Generators):
        def submit(self, *args: Any) -> Call:
            if self.asked:
                raise ActorFailure("no generator is left")
            return super().submit(*args)

    with monkeypatch.context() as context, pytest.raises(ActorFailure):
        context.setattr("jobs.rollouts.SLICE", 4)
        samples(RunFolder(str(tmp_path / "failed")), Failing(None), 1)
    again = Generators(None)
    assert [plain(t) for t in samples(RunFolder(str(tmp_path / "failed")), again, 2)] == [plain(t) for t in wanted]
    assert again.asked == undisturbed.asked[4:]

    # What a kill leaves is what was there before it: nothing is written on the way out.
    killed = RunFolder(str(tmp_path / "killed"))

    class Killed(Generators):
        def submit(self, *args: Any) -> Call:
            if len(self.asked) == 8:
                shutil.copytree(tmp_path / "dying" / "sampling", killed.path / "sampling")
                raise ActorFailure("no generator is left")
            return super().submit(*args)

    with monkeypatch.context() as context, pytest.raises(ActorFailure):
        context.setattr("jobs.rollouts.SLICE", 4)
        samples(RunFolder(str(tmp_path / "dying")), Killed(None), 1)
    after = Generators(None)
    assert [plain(t) for t in samples(killed, after, 2)] == [plain(t) for t in wanted]
    assert after.asked == undisturbed.asked[8:]
    third = Generators(None)  # the stage failed later, such as when its labeller does not answer
    assert [plain(t) for t in samples(run, third, 1)] == [plain(t) for t in wanted] and not third.asked
