"""Starting a training loop (SFT, reward model, PPO learner) under Ray Train, or in this process.

What the loops themselves share lives in `rayrlhf.models.ranks` (Ranks) and `rayrlhf.algorithms.optimizer` (Optimizer).
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from rayrlhf.config import LearnerConfig
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.models.ranks import Ranks
from rayrlhf.runs.storage import Store, is_uri, sync_mirrors

# Ray Train polls its workers every 2 s, which would slow every shorter step down to 2 s.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
}


@dataclass(frozen=True)
class _LocalCheckpoints:
    """Where a local `fit` keeps its checkpoints."""

    directory: Path
    keep: int

    def all(self) -> list[Path]:
        return sorted(self.directory.glob("checkpoint_" + 6 * "[0-9]"))

    def save(self, write: Callable[[Path], None]) -> None:
        number = int(self.all()[-1].name.split("_")[1]) + 1 if self.all() else 0
        with replacing(self.directory / f"checkpoint_{number:06d}", directory=True) as directory:
            write(directory)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)


_local: _LocalCheckpoints | None = None


def fit(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    name: str,
    storage: str | Path,
    learner: LearnerConfig,
    keep_checkpoints: int,
    local: bool,
) -> None:
    """Run `loop(arguments)` on Ray Train's workers, or in this process if `local`.

    Checkpoints live under `storage/name`; calling again with the same two resumes from the newest one. `storage` is a
    path or, unless `local`, a URI.

    Raises:
        UserError: raised by the loop on any worker, passed on as it is.
        FloatingPointError: raised by the loop on all workers alike; it names the last good checkpoint.
        ray.train.TrainingFailedError: workers failed more often than `learner.max_failures`.
        KeyboardInterrupt: Ctrl-C; the workers are gone then.
    """
    global _local
    if local:
        # Not Ray Train's own local mode, which ends torch's process group: an engine in this process still needs it.
        _local = _LocalCheckpoints(Path(storage) / name, keep_checkpoints)
        try:
            not_finite = _until_not_finite(loop, arguments)
            newest = _local.all()[-1:]
        finally:
            _local = None
        _raise_not_finite(not_finite, str(newest[0]) if newest else None)
        return
    os.environ.update(TRAIN_ENVIRONMENT)
    filesystem, root = None, str(storage)
    if is_uri(storage):
        store = Store.open(str(storage))
        filesystem, root = store.filesystem, store.root
    else:
        Path(storage).mkdir(parents=True, exist_ok=True)
    resources: dict[str, float] = {"CPU": learner.cpus}
    if learner.gpus:
        resources["GPU"] = learner.gpus
    trainer = TorchTrainer(
        functools.partial(_until_not_finite, loop),
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if learner.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=learner.workers,
            use_gpu=learner.gpus > 0,
            resources_per_worker=resources,
            label_selector=learner.labels or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=learner.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep_checkpoints),
        ),
    )
    try:
        with _interruptible():
            result = trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
        raise
    _raise_not_finite(result.return_value, result.checkpoint.path if result.checkpoint else None)


def _until_not_finite(loop: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> str | None:
    """Run the loop; a FloatingPointError comes back as its message.

    It is the same on all workers, since norms and means are of all of them. To Ray Train it is not a failure: a worker
    group that starts anew from the last checkpoint would arrive at the same numbers.
    """
    try:
        loop(arguments)
    except FloatingPointError as error:
        return str(error)
    finally:
        with suppress(OSError):  # what ended the loop is what matters
            sync_mirrors()
    return None


def _raise_not_finite(message: str | None, checkpoint: str | None) -> None:
    if message is not None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there was no checkpoint yet"
        raise FloatingPointError(f"{message}; {kept}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt here as elsewhere.

    Ray Train sets a handler of SIGINT that ends the process with status 0, and leaves it behind when it is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def restored() -> Iterator[Path | None]:
    """Inside a loop: the newest checkpoint as a local directory, or None at a fresh start."""
    if _local:
        yield _local.all()[-1] if _local.all() else None
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as directory:
            yield Path(directory)


def report(ranks: Ranks, metrics: dict[str, float], write: Callable[[Path], None]) -> None:
    """Inside a loop, on every rank equally often: rank 0's `write(directory)` fills a new checkpoint."""
    sync_mirrors()  # lest a restart from this checkpoint find steps without their metrics
    if _local:
        _local.save(write)
    elif ranks.first:
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))
    else:
        ray.train.report(metrics)
