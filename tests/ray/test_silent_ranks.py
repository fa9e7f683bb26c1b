"""Learner ranks that give no sign of life are killed and start again; those that work or wait are left alone."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import operator
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.pools.autopsy import examine_if_still
from actors.pools.beats import Beat
from actors.training.loop import Loop, LoopArguments
from actors.training.workers import Workers
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.models.ranks import Ranks


def train(arguments: LoopArguments) -> None:
    """Four steps with a checkpoint each; rank 1 is stopped in the third one if there is a file `stop`."""
    with Loop("rl", arguments) as loop:
        directory = Path(arguments.run_dir)
        weight = torch.ones(1)
        if found := loop.restore():
            weight = found[1]["weight"]
        (directory / f"pid-{loop.ranks.rank}-from-{loop.step}").write_text(str(os.getpid()))
        while loop.step < 4:
            if loop.step == 2 and loop.ranks.rank == 1 and (directory / "stop").exists():
                (directory / "stop").unlink()
                os.kill(os.getpid(), signal.SIGSTOP)  # this thread may run on for a moment, into the next step
            weight = weight + loop.ranks.sum(weight * (1 + loop.ranks.rank))
            loop.step += 1
            loop.save({"weight": weight})


def lock_in_one_call(directory: Path) -> None:
    """Rank 1 works in one call that holds Python's lock, so that it cannot beat; rank 0 waits for it all the while."""
    ranks = Ranks(threads=1)
    if ranks.rank == 1:
        with (directory / "go").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as go:
            (directory / "pid-1").write_text(str(os.getpid()))
            any(map(operator.itemgetter(0), itertools.repeat(go)))  # until it is no zero; no line of Python in between
    ranks.sum(torch.zeros(1))
    (directory / f"done-{ranks.rank}").write_text(str(os.getpid()))


def hang_with_the_lock(directory: Path) -> None:
    """Rank 1 waits for good in a call that holds Python's lock: for somebody who writes into a pipe."""
    ranks = Ranks(threads=1)
    if ranks.rank == 1 and not (directory / "pid").exists():
        (directory / "pid").write_text(str(os.getpid()))
        ctypes.PyDLL(None).open(str(directory / "pipe").encode(), os.O_RDONLY)
    ranks.sum(torch.zeros(1))


def config(runs_dir: Path) -> Config:
    resources: dict[str, Any] = {"learner": {"workers": 2, "cpus": 0.5, "max_failures": 2}}
    return parse_config({"name": "run", "runs_dir": str(runs_dir), "resources": resources}, "test")


announced: list[tuple[str, str]] = []


@pytest.fixture(scope="module")
def workers(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    storage = tmp_path_factory.mktemp("storage")
    own = Workers(
        config(storage).resources.learner,
        str(storage),
        "silent",
        local=False,
        announce=lambda *said: announced.append(said),
        heartbeat_timeout_s=3.0,
    )
    yield own
    own.close()


def trained(workers: Workers, run_dir: Path) -> dict[str, torch.Tensor]:
    """The state after `train`."""
    workers.train(train, LoopArguments(config(run_dir.parent), str(run_dir), "rl", 2))
    newest = max((run_dir / "checkpoints" / "rl").glob("checkpoint_*"))
    state: dict[str, torch.Tensor] = torch.load(newest / "state.pt", weights_only=True)
    return state


def test_a_stopped_rank_is_killed_and_the_task_ends_as_if_undisturbed(workers: Workers, tmp_path: Path) -> None:
    (stopped := tmp_path / "stopped").mkdir()
    (undisturbed := tmp_path / "undisturbed").mkdir()
    (stopped / "stop").touch()
    assert trained(workers, stopped) == trained(workers, undisturbed)
    ((said, whole),) = announced
    assert said == (
        "learner rank 1 gave no sign of life for 3 s and was killed (resources.heartbeat_timeout_s); "
        "the learner goes on from its last checkpoint, 1 of 2 restarts left"
    )
    assert f"learner rank 1, process {(stopped / 'pid-1-from-0').read_text()}: state T" in whole
    before = {path.read_text() for path in stopped.glob("pid-*-from-0")}
    after = {path.read_text() for path in stopped.glob("pid-*-from-[1-4]")}
    assert len(before) == len(after) == 2 and not before & after
    assert not Path(f"/proc/{(stopped / 'pid-1-from-0').read_text()}").exists()


def test_who_works_in_one_call_or_waits_is_left_alone(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the one that works has been silent for so long that it is looked at twice."""
    (tmp_path / "go").write_bytes(b"\0")
    looked_at: list[int] = []

    def examine(beat: Beat) -> str:
        looked_at.append(beat.pid)
        whole = examine_if_still(beat)
        if looked_at.count(int((tmp_path / "pid-1").read_text())) == 2:
            with (tmp_path / "go").open("r+b") as file:  # in place: whoever reads what is cut off gets SIGBUS
                file.write(b"\1")
        return whole

    monkeypatch.setattr("actors.training.silent_ranks.examine_if_still", examine)
    before = list(announced)
    workers.train(lock_in_one_call, tmp_path)
    assert (tmp_path / "done-1").read_text() == (tmp_path / "pid-1").read_text()
    assert announced == before


# Another start of both ranks. unit/test_autopsy looks at such a process, and the first test of this file kills one.
@pytest.mark.long
def test_a_rank_that_hangs_with_pythons_lock_is_killed(workers: Workers, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(announced)
    workers.train(hang_with_the_lock, tmp_path)
    ((said, whole),) = announced[before:]
    assert said.startswith("learner rank 1 gave no sign of life for 3 s and was killed")
    assert f"process {(tmp_path / 'pid').read_text()}: state S" in whole and "hang_with_the_lock" in whole
