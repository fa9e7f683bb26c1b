"""Ray Train's workers serve task after task; what goes wrong in one comes back in one line, or is done again."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.pools.remote import ActorFailure, Remote
from actors.training.loop import Loop, LoopArguments
from actors.training.workers import Workers
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.failures import told
from rayrlhf.models.ranks import Ranks
from rayrlhf.runs.metrics import read_metrics
from tests.ray.sft_runs import (
    TINY,
    TransformersCoordinator,
    demonstrations,
    distance,
    make_config,
    run_sft,
    start_weights,
    weights,
)
from tests.sockets import beyond_loopback, listening


def write_pid(arguments: tuple[Path, str]) -> None:
    directory, name = arguments
    (directory / f"{name}-{dist.get_rank()}").write_text(str(os.getpid()))


def only_rank_1_has_no_data(arguments: None) -> None:
    """Rank 0 waits in a collective for a rank that will never come."""
    ranks = Ranks(threads=1)
    if ranks.rank == 1:
        raise UserError("a learner worker got no trajectory")
    ranks.sum(torch.zeros(1))


def die_once(directory: Path) -> None:
    """Every rank is there before one of them dies; the group that comes after it writes who it is."""
    ranks = Ranks(threads=1)
    again = bool(ranks.broadcast((directory / "died").exists()))
    if not again and ranks.rank == 1:
        (directory / "died").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum(torch.zeros(1))
    (directory / f"again-{ranks.rank}").write_text(str(os.getpid()))


def train_until_released(directory: Path) -> None:
    """Every rank is in the group and goes on exchanging sums until rank 0 sees the file `release`."""
    ranks = Ranks(threads=1)
    while not ranks.broadcast((directory / "release").exists()):
        assert float(ranks.sum(torch.ones(1))) == 2.0
        (directory / f"trains-{ranks.rank}").touch()
        time.sleep(0.01)


def full_disk(arguments: LoopArguments) -> None:
    """As `save` would on rank 1, while rank 0 waits for it; attempts are counted in a file."""
    with Loop("rl", arguments) as loop:
        loop.step = 12
        if loop.ranks.rank == 1:
            with (Path(arguments.run_dir) / "attempts").open("a") as file:
                file.write("x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/state.pt")
        loop.ranks.sum(torch.zeros(1))


def diverging_loop(arguments: LoopArguments) -> None:
    """A weight that grows until its square overflows float32; a checkpoint a step, attempts counted in a file."""
    with Loop("rl", arguments) as loop:
        with (Path(arguments.run_dir) / f"attempts-{loop.ranks.rank}").open("a") as file:
            file.write("x")
        weight = torch.tensor(1.0)
        while True:
            weight = weight * 1e10
            total = loop.ranks.sum(weight.double() * torch.isfinite(weight.square()))
            if not total:
                raise FloatingPointError("the gradient norm is inf")
            loop.step += 1
            loop.save({"weight": weight})


def config(tmp_path: Path) -> Config:
    resources: dict[str, Any] = {"learner": {"workers": 2, "cpus": 0.5, "max_failures": 1}}
    return parse_config({"name": "run", "runs_dir": str(tmp_path), "resources": resources}, "test")


announced: list[tuple[str, str]] = []
"""What the workers of this file have said of their restarts."""


@pytest.fixture(scope="module")
def workers(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    storage = tmp_path_factory.mktemp("storage")
    learner = config(storage).resources.learner
    own = Workers(learner, str(storage), "workers", local=False, announce=lambda *said: announced.append(said))
    yield own
    own.close()


def pids(directory: Path, name: str) -> list[str]:
    return [(directory / f"{name}-{rank}").read_text() for rank in range(2)]


def test_the_same_processes_do_task_after_task(workers: Workers, tmp_path: Path) -> None:
    workers.train(write_pid, (tmp_path, "first"))
    workers.train(write_pid, (tmp_path, "second"))
    assert pids(tmp_path, "first") == pids(tmp_path, "second")
    assert len({*pids(tmp_path, "first"), str(os.getpid())}) == 3


def test_nothing_listens_beyond_this_machine_while_two_workers_train(workers: Workers, tmp_path: Path) -> None:
    """All processes of the cluster, and what Ray Train, torch's store and gloo have opened in the two workers."""
    work = threading.Thread(target=workers.train, args=(train_until_released, tmp_path))
    work.start()
    try:
        while work.is_alive() and {path.name for path in tmp_path.iterdir()} != {"trains-0", "trains-1"}:
            time.sleep(0.05)
        assert work.is_alive(), "the task ended before both ranks trained"
        found = listening()
    finally:
        (tmp_path / "release").touch()
        work.join()
    assert found and not beyond_loopback(found)


def test_not_finite_stops_at_once_and_names_the_last_checkpoint(workers: Workers, tmp_path: Path) -> None:
    """The group stays as it is: one that starts anew would only arrive there again."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    workers.train(write_pid, (tmp_path, "before"))
    with pytest.raises(FloatingPointError) as raised:
        workers.train(diverging_loop, LoopArguments(config(tmp_path), str(run_dir), "rl", 2))
    kept = run_dir / "checkpoints" / "rl" / "checkpoint_000000"
    assert str(raised.value) == f"the gradient norm is inf; the last good checkpoint is {kept}"
    assert torch.load(kept / "state.pt", weights_only=True) == {"weight": pytest.approx(1e10), "step": 1}
    assert [(run_dir / f"attempts-{rank}").read_text() for rank in range(2)] == ["x", "x"]
    workers.train(write_pid, (tmp_path, "after"))
    assert pids(tmp_path, "before") == pids(tmp_path, "after")


def test_two_ray_train_workers_end_with_the_weights_of_one(workers: Workers, tmp_path: Path) -> None:
    """Three steps on two gloo workers, with the coordinator in a third process, against the same in this process."""
    train, dev = demonstrations()
    rows = (train[:45], dev)  # the last batch is smaller
    coordinator = Remote.spawn("c", TransformersCoordinator, TINY, local=False, options={"num_cpus": 0})
    alone = make_config(tmp_path / "one", micro_batch_tokens=500)
    one, _ = run_sft(alone, rows, Remote("c", TransformersCoordinator(TINY), local=True))
    shared = alone.model_copy(
        update={
            "runs_dir": str(tmp_path / "two"),
            "resources": alone.resources.model_copy(
                update={"learner": alone.resources.learner.model_copy(update={"workers": 2})}
            ),
        }
    )
    two, metrics = run_sft(shared, rows, coordinator, workers)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    moved = distance(weights(one / "sft"), start_weights())
    assert distance(weights(two / "sft"), weights(one / "sft")) < min(1e-5, 1e-2 * moved)
    for ours, theirs in zip(metrics, read_metrics(one, "sft"), strict=True):
        assert (
            ours["sft/dev_loss"] == pytest.approx(theirs["sft/dev_loss"], rel=1e-5) if "sft/dev_loss" in ours else True
        )
    assert metrics[-1]["sft/rouge1"] == pytest.approx(read_metrics(one, "sft")[-1]["sft/rouge1"], abs=0.05)
    assert any((two / "checkpoints" / "sft").glob("checkpoint_*/state.pt"))
    coordinator.kill()


def test_a_mistake_that_one_rank_finds_ends_the_task_for_all(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^a learner worker got no trajectory$"):
        workers.train(only_rank_1_has_no_data, None)
    workers.train(write_pid, (tmp_path, "new"))  # by workers that do not hang in that collective
    assert len(set(pids(tmp_path, "new"))) == 2


def test_a_full_disk_is_told_at_once_since_a_restart_would_only_meet_it_again(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ActorFailure) as raised:
        workers.train(full_disk, LoopArguments(config(tmp_path), str(tmp_path / "run"), "rl", 2))
    assert told(raised.value) == (
        "rl step 13: learner rank 1 raised OSError: No space left on device: '/data/state.pt'; free space on that disk"
    )
    assert "in full_disk" in str(raised.value.__cause__)  # for the log
    assert (tmp_path / "run" / "attempts").read_text() == "x" and not announced


def test_a_task_whose_worker_dies_is_done_again_by_new_ones(workers: Workers, tmp_path: Path) -> None:
    workers.train(write_pid, (tmp_path, "before"))
    workers.train(die_once, tmp_path)
    assert (tmp_path / "died").read_text() == pids(tmp_path, "before")[1]
    assert not {*pids(tmp_path, "again")} & {*pids(tmp_path, "before")}
    ((said, _),) = announced
    assert said.startswith("learner rank 1 died: its process ended at once")
    assert said.endswith("; the learner goes on from its last checkpoint, 0 of 1 restarts left")
    (tmp_path / "died").unlink()
    with pytest.raises(ActorFailure) as raised:
        workers.train(die_once, tmp_path)
    assert str(raised.value).startswith("learner rank 1 died: ") and len(announced) == 1
    assert str(raised.value).endswith("; its one restart is used up (resources.learner.max_failures=1)")


def test_in_this_process_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    def loop(arguments: LoopArguments) -> None:
        with Loop("rl", arguments):
            raise FloatingPointError("a score of the batch is not finite")

    with pytest.raises(FloatingPointError, match="is not finite; there was no checkpoint yet"):
        Workers(config(tmp_path).resources.learner, "", "", local=True).train(
            loop, LoopArguments(config(tmp_path), str(tmp_path / "run"), "rl", 2)
        )
