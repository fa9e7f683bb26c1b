"""Ray Train's worker group: it starts once and serves every training stage of a run.

To start one takes tens of seconds, most of which every worker spends on importing torch and transformers. So the
workers stay, and wait for the next stage (`actors.training.tasks`). Ray Train places them, sets up torch's process
group, watches them and starts them again when one dies; checkpoints are `rayrlhf.runs.checkpoints`'.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ErroredState, ReschedulingState, RestartingState

from actors.pools.beats import begin_beats
from actors.pools.remote import ActorFailure, Remote, death_of
from actors.training.loopback import LoopbackTorchConfig
from actors.training.silent_ranks import SilentRanks
from actors.training.tasks import (
    TRAIN_ENVIRONMENT,
    BeatingRank,
    Failed,
    Given,
    GroupEnd,
    News,
    Outcome,
    StopRequest,
    Tasks,
)
from rayrlhf.config_resources import LearnerConfig
from rayrlhf.errors import PlainError, UserError, without_colour
from rayrlhf.failures import cause_of, lasting, locate, place_of
from rayrlhf.models.ranks import Ranks
from rayrlhf.runs.addresses import is_uri
from rayrlhf.runs.storage import Store

_WAIT_S = 1.0
"""How long the driver waits for an outcome before it looks whether the worker group still lives."""
_IDLE_S = 30.0
"""How long a worker waits for work before it asks again."""
_CALL_S = 300.0
"""How long the actor that hands out tasks may take to answer. It does nothing else, but its process may have to start
on a machine that is busy, where Ray's processes come last (they are nice): a minute was seen to be too short."""
_END_S = 20.0
"""How long Ray Train may take to end its workers."""

TrainingLoop = Callable[[Any], None]
log = logging.getLogger(__name__)


class RemoteTraceback(Exception):
    """The cause of an `ActorFailure`: what another process has written about it."""


class Workers:
    """The learner's workers: Ray Train's, or this process if `local`."""

    def __init__(
        self,
        learner: LearnerConfig,
        storage: str,
        name: str,
        local: bool,
        announce: Callable[[str, str], None] = lambda text, whole: log.warning("%s", text),
        heartbeat_timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            storage: path or URI that every node sees, for Ray Train's own files.
            name: of the group, in Ray's dashboard.
            announce: gets one line for each restart of the workers, and the whole of what led to it.
            heartbeat_timeout_s: a rank that gives no sign of life for so many seconds is killed; None: none beats.
        """
        self.learner, self.storage, self.name, self.local = learner, storage, name, local
        self._announce = announce
        self._silent_ranks = SilentRanks(heartbeat_timeout_s, self._ask)
        self._tasks: Any = None
        self._stop = StopRequest()
        self._number = 0
        self._heard = 0
        """News that have been announced."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin to start the workers, unless they are up; returns at once."""
        if self.local or self._thread is not None:
            return
        for key, value in TRAIN_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        here = ray.get_runtime_context().get_node_id()
        # On the driver's node: that one cannot vanish without the driver.
        self._tasks = (
            ray.remote(Tasks)
            .options(num_cpus=0, label_selector={ray._raylet.RAY_NODE_ID_KEY: here})
            .remote(self.learner.workers, self.learner.max_failures)
        )
        self._number, self._heard, self._failure = 0, 0, None
        self._thread = threading.Thread(target=self._fit, args=(self._trainer(),), name="ray train", daemon=True)
        self._thread.start()

    def stop_request(self) -> Remote:
        """The `StopRequest` of these workers' loops; starts the workers unless they are up."""
        self.start()
        return Remote("the actor of training tasks", self._stop if self.local else self._tasks, self.local)

    def train(self, loop: TrainingLoop, arguments: Any) -> None:
        """Run `loop(arguments)` on every worker; returns when it has ended.

        Raises:
            UserError: raised by the loop on any worker, passed on as it is.
            FloatingPointError: raised by the loop on all workers alike; it names the last good checkpoint.
            ActorFailure: workers failed more often than `learner.max_failures`, or with what a restart cannot help
                against; or the actor that hands out tasks is gone. It names the culprit, stage and step.
        """
        if self.local:
            loop(arguments)
            return
        self.start()
        self._number += 1
        try:
            outcome = self._outcome((ray.put((loop, arguments)),))
        except BaseException:
            self.close()  # what the workers are in the middle of is nobody's any more
            raise
        if outcome.user_error is not None:
            self.close()  # perhaps on one rank only, for which the others wait
            raise UserError(outcome.user_error)
        if outcome.not_finite is not None:
            raise FloatingPointError(outcome.not_finite)
        if outcome.failed is not None:
            self.close()
            raise _failure(outcome.failed.cause, outcome.failed.traceback, outcome.failed.place)

    def close(self) -> None:
        """End the workers, in the middle of their work if they are at it."""
        self._silent_ranks.forget_all()
        thread, self._thread = self._thread, None
        if thread is None or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):  # whatever is gone already is what was wanted
            controller = ray.get(self._tasks.controller.remote(), timeout=3 * _END_S)
            if controller is not None:
                ray.get(controller.abort.remote(), timeout=_END_S)
        thread.join(_END_S)
        with contextlib.suppress(RayError):
            ray.kill(self._tasks)

    def _outcome(self, task: tuple[Any, ...]) -> Outcome:
        assert self._thread is not None
        self._ask("give", self._number, task)
        while True:
            found: Outcome | None = self._ask("outcome", self._number, _WAIT_S)
            ended = not self._thread.is_alive()  # before the news are read: its last ones are among them then
            last = self._read_news()
            if found is not None:
                return found
            if last is not None:
                raise _failure(last.text, last.traceback)
            if ended:
                raise _given_up(self._failure)
            self._silent_ranks.look()

    def _read_news(self) -> News | None:
        """Announce what is new of the worker group; returns why Ray Train has given up, if it has."""
        news: list[News] = self._ask("news", self._heard)
        self._heard += len(news)
        for each in news:
            if each.final:
                return each
            self._announce(each.text, each.traceback)
        return None

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._tasks, method).remote(*args), timeout=_WAIT_S + _CALL_S)
        except GetTimeoutError:
            raise ActorFailure(f"the actor that hands out training tasks does not answer {method}") from None
        except RayError as error:
            raise ActorFailure(
                f"the actor that hands out training tasks died during {method}: {death_of(error)}"
            ) from error

    def _fit(self, trainer: _Trainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # for the thread that waits for an outcome
            self._failure = error

    def _trainer(self) -> _Trainer:
        learner = self.learner
        filesystem, root = None, self.storage
        if is_uri(self.storage):
            store = Store.open(self.storage)
            filesystem, root = store.filesystem, store.root
        else:
            Path(self.storage).mkdir(parents=True, exist_ok=True)
        resources: dict[str, float] = {"CPU": learner.cpus}
        if learner.gpus:
            resources["GPU"] = learner.gpus
        backend = "nccl" if learner.gpus else "gloo"
        private = ray.util.get_node_ip_address() == "127.0.0.1"
        return _Trainer(
            _serve,
            train_loop_config={
                "tasks": [self._tasks],
                "learner": learner,
                "beat_every_s": self._silent_ranks.every_s,
            },
            torch_config=LoopbackTorchConfig(backend) if private else TorchConfig(backend),
            scaling_config=ScalingConfig(
                num_workers=learner.workers,
                use_gpu=learner.gpus > 0,
                resources_per_worker=resources,
                label_selector=learner.labels or None,
            ),
            run_config=RunConfig(
                name=self.name,
                storage_path=root,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=learner.max_failures),
                callbacks=[_ToTasks(self._tasks)],
            ),
        )


class _Trainer(TorchTrainer):
    """Ray Train without two actors that take seconds to start.

    One serves data sets, which the loops do not read by Ray Data. The other removes the workers' placement group if
    Ray Train's controller dies and its job lives on; here the run ends then, and Ray removes what its job has made.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]


_ENDS: dict[type, GroupEnd] = {
    RestartingState: GroupEnd.RESTARTS, ReschedulingState: GroupEnd.TRIES_AGAIN, ErroredState: GroupEnd.FINAL,
}  # fmt: skip
"""What Ray Train does about a failed group, by the state of its controller."""


class _ToTasks(ControllerCallback):
    """Tells `Tasks` which actor Ray Train's controller is, and how the worker group fails.

    `fit` has no way to end a run from another thread, and its error has the causes cut in the middle.
    """

    def __init__(self, tasks: Any) -> None:
        self._tasks = tasks

    def after_controller_start(self, *args: Any) -> None:
        self._tasks.set_controller.remote([ray.get_runtime_context().current_actor])

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if type(current_state) in _ENDS:
            seen, dead = seen_by_ray_train(current_state.training_failed_error)
            with contextlib.suppress(RayError):  # the driver is gone, and the run with it
                told = self._tasks.group_failed.remote(seen, dead, _ENDS[type(current_state)])
                ray.get(told, timeout=_CALL_S)


def seen_by_ray_train(error: ray.train.TrainingFailedError) -> tuple[Failed, bool]:
    """What Ray Train's error says of a failed worker group, and whether a worker's process is gone."""
    whole = without_colour("".join(traceback.format_exception(error)))
    ranks: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(ranks.items()):
        if isinstance(failure, WorkerHealthCheckFailedError) and isinstance(
            failure.health_check_failure, RayActorError
        ):
            return Failed(f"learner rank {rank} died: {death_of(failure.health_check_failure)}", None, whole), True
    for rank, failure in sorted(ranks.items()):
        return Failed(f"learner rank {rank} raised {cause_of(failure)}", None, whole), False
    inner = getattr(error, "controller_failure", error)
    return Failed(f"the learner's workers could not start: {cause_of(inner)}", None, whole), False


def _failure(text: str, whole: str, place: str | None = None) -> ActorFailure:
    failure = ActorFailure(text)
    failure.__cause__ = RemoteTraceback(f"\n{whole}")
    if place:
        locate(failure, place)
    return failure


def _given_up(error: BaseException | None) -> ActorFailure:
    """Ray Train ended without any news of it."""
    if isinstance(error, ray.train.TrainingFailedError):
        seen, _ = seen_by_ray_train(error)
        return _failure(seen.told(), seen.traceback)
    why = death_of(error) if isinstance(error, RayActorError) else cause_of(error) if error else "nothing says why"
    failure = ActorFailure(f"Ray Train's controller ended in the middle of its work: {why}")
    failure.__cause__ = error
    return failure


# ---- in the workers


def _serve(settings: dict[str, Any]) -> None:
    """Do task after task, until `Workers.close` ends this process.

    Whatever a loop raises that is not an outcome is Ray Train's to handle: it starts the workers anew, up to
    `max_failures` times.
    """
    (tasks,), learner = settings["tasks"], settings["learner"]
    ranks = Ranks(learner.threads, gpu=learner.gpus > 0)
    if settings["beat_every_s"] is not None:
        beating = BeatingRank(ranks.rank, uuid.uuid4().hex)
        begin_beats(beating.key, settings["beat_every_s"])
        ray.get(tasks.rank_beats.remote(beating), timeout=_CALL_S)
    # All ranks must begin with the same task: rank 0 asks.
    done = int(ranks.broadcast(ray.get(tasks.begin.remote(), timeout=_CALL_S) if ranks.first else 0))
    while True:
        given: Given = ray.get(tasks.next.remote(done, _IDLE_S), timeout=_IDLE_S + _CALL_S)
        if not given.task:
            continue  # nothing yet
        loop, arguments = ray.get(given.task[0], timeout=_CALL_S)
        outcome = _run(loop, arguments, ranks.rank, tasks)
        ray.get(tasks.finish.remote(given.number, ranks.rank, outcome), timeout=_CALL_S)
        done = given.number
        del loop, arguments
        _free_memory()


def _run(loop: TrainingLoop, arguments: Any, rank: int, tasks: Any) -> Outcome:
    try:
        loop(arguments)
    except UserError as error:
        return Outcome(user_error=str(error))
    except FloatingPointError as error:
        # The same on all ranks, since norms and means are of all of them. Not a failure: a group that starts anew from
        # the last checkpoint would arrive at the same numbers.
        return Outcome(not_finite=str(error))
    except Exception as error:
        failed = _failed(error, rank)
        again = ray.get(tasks.failed.remote(failed), timeout=_CALL_S)
        if again or lasting(failed.cause):
            return Outcome(failed=failed)
        raise
    return Outcome()


def _failed(error: Exception, rank: int) -> Failed:
    # What is plain already names its own culprit, such as a generator.
    who = "" if isinstance(error, PlainError) else f"learner rank {rank} raised "
    whole = without_colour("".join(traceback.format_exception(error)))
    return Failed(f"{who}{cause_of(error)}", place_of(error), f"learner rank {rank}:\n{whole}")


def _free_memory() -> None:
    """Models and optimisers of the last stage are garbage; its peak of memory is not the next one's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # generators and scorers may share the device
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: ru_maxrss counts from here
