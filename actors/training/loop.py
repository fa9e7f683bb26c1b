"""What every training loop has around its steps: its rank, its metrics, its checkpoints, and the model that it leaves.

    with Loop("sft", arguments) as loop:
        model = loop.trained("model", load_policy(...), seed)
        found = loop.restore()            # the newest checkpoint, after an interrupt or a failure
        while loop.step < steps:
            ...                           # one optimiser step
            loop.step += 1
            loop.log(metrics)
            loop.save(state)              # now and then, and if loop.stopping(): then return
        loop.finish(write)                # the run folder's sft/

All ranks call the same methods in the same order; what only one of them may do, rank 0 does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat, TypeVar

import torch
from transformers import PreTrainedModel

from actors.pools.monitoring import metrics_writer
from actors.pools.remote import Remote
from rayrlhf.config import Config
from rayrlhf.failures import locate
from rayrlhf.models.loading import checkpoint_gradients
from rayrlhf.models.lora import add_adapters
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import require_finite
from rayrlhf.reports.warnings import Watch
from rayrlhf.runs.checkpoints import Checkpoints
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.storage import sync_mirrors

STATE = "state.pt"
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


@dataclass(frozen=True)
class LoopArguments:
    """What every worker needs; picklable, paths absolute."""

    config: Config
    run_dir: str
    """Path or URI."""
    checkpoints: str
    """Name of this training's checkpoints, see `Session.checkpoint_name`."""
    keep_checkpoints: int
    stop: Remote | None = field(default=None, kw_only=True)
    """A `StopRequest`; None if nobody will ask the loop to end early."""


class Loop:
    """One training on one rank."""

    def __init__(self, stage: str, arguments: LoopArguments) -> None:
        config, learner = arguments.config, arguments.config.resources.learner
        self.stage, self.config = stage, config
        self.step = 0
        """Finished steps."""
        self.steps: int | None = None
        """Of how many; the loop sets it, and the first line of metrics says it."""
        self._said_steps = False
        self.run = RunFolder(arguments.run_dir)
        self.ranks = Ranks(learner.threads, gpu=learner.gpus > 0)
        self.checkpoints = Checkpoints(self.run, arguments.checkpoints, arguments.keep_checkpoints)
        self._writer = metrics_writer(self.run.address, config.name) if self.ranks.first else None
        self._watch = Watch(config)
        self._models: dict[str, PreTrainedModel] = {}
        self._stop_request = arguments.stop
        self._last: int | None = None
        """The newest whole checkpoint."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error matters more
                self._writer.close()
        if isinstance(error, FloatingPointError):
            last = None if self._last is None else self.checkpoints.address(self._last)
            kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
            raise FloatingPointError(f"{error}; {kept}") from None
        if isinstance(error, Exception):
            locate(error, f"{self.stage} step {min(self.step + 1, self.steps or self.step + 1)}")

    # ---- models

    def trained(self, name: str, model: AnyModel, seed: int) -> AnyModel:
        """The model as it will be trained: with adapters if the config says so, and with gradient checkpointing.

        `save` and `finish` check that its weights are finite before they keep any.
        """
        if self.config.model.lora:
            add_adapters(model, self.config.model.lora, seed)
        if self.config.resources.learner.gradient_checkpointing:
            checkpoint_gradients(model)
        self._models[name] = model
        return model

    def require_finite(self) -> None:
        """See that the last update left numbers: gradients are checked before it, and it may overflow all the same.

        Raises:
            FloatingPointError: on every rank, since all ranks hold the same weights.
        """
        for name, model in self._models.items():
            require_finite(model, f"{self.stage}: the {name}", self.ranks)

    def stopping(self) -> bool:
        """Whether the user asked the loop to save and end now, before its last step; the same on all ranks."""
        if self._stop_request is None or self.step == self.steps:
            return False
        limit = self.config.resources.call_timeout_s
        asked = self.ranks.first and self._stop_request.call("stop_requested", timeout_s=limit)
        return bool(self.ranks.broadcast(asked))

    # ---- metrics

    def log(self, metrics: Mapping[str, SupportsFloat]) -> None:
        """Record metrics of the step that was finished last; before the first step, of the start.

        What they warn of is recorded, too.
        """
        if not self._said_steps and self.steps is not None:
            metrics = {f"{self.stage}/steps": self.steps, **metrics}
            self._said_steps = True
        if self._writer:
            self._writer.write(self.stage, self.step, metrics, self._watch.add)

    def warn(self, text: str) -> None:
        """Warn the user of something in one line."""
        if self._writer:
            self._writer.warn(self.stage, self.step, [text])

    @property
    def reason_to_stop(self) -> str | None:
        """Why an alarm ends the stage after the step that was logged last, and what to do; None if it may go on.

        The same on all ranks.
        """
        return self.ranks.broadcast(self._watch.reason_to_stop)

    def log_evaluation(self, metrics: Mapping[str, SupportsFloat]) -> None:
        """Record what the model of this step does on dev prompts: the lines and names of `STAGE_eval`."""
        if self._writer:
            self._writer.write(f"{self.stage}_eval", self.step, metrics)

    def show_answers(self, text: str) -> None:
        """Show what it answers, in a few lines."""
        if self._writer:
            self._writer.write_text(f"{self.stage}_eval", self.step, "answers", text)

    def note(self, text: str) -> None:
        """Tell the user something in one line."""
        if self._writer:
            self._writer.write_text(self.stage, self.step, "note", text)

    def sample(self, sample: Mapping[str, str]) -> None:
        """Show a prompt, its reference and the model's answer."""
        if self._writer:
            self._writer.write_text(self.stage, self.step, "sample", sample)

    # ---- checkpoints

    def restore(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and the state in it, which has `step`; None at a fresh start.

        `step` is set from it, and damaged checkpoints that are newer are named to the user.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        number, damaged = self.checkpoints.newest() if self.ranks.first else (None, [])
        self._last, damaged = self.ranks.broadcast((number, damaged))
        if self._last is None:
            done = max((line["step"] for line in self._lines_before()), default=0)
            if done:
                self.note(
                    f"there is no checkpoint of these settings: the {done} steps of an earlier start are done again"
                )
            return None
        directory = self.checkpoints.read(self._last)
        state = torch.load(directory / STATE, weights_only=True, map_location=self.ranks.device)
        self.step = state["step"]
        for line in self._lines_before():
            if line["step"] <= self.step:
                self._watch.add(line)
        for each in damaged:  # only now: a line of an earlier step would take back the metrics of those after it
            self.note(f"{each}; continuing from {self.checkpoints.address(self._last)}")
        return directory, state

    def _lines_before(self) -> list[dict[str, Any]]:
        """What earlier starts have logged of this stage; rank 0 alone looks."""
        return read_metrics(self.run.address, self.stage) if self.ranks.first else []

    def save(self, state: Mapping[str, Any], models: Callable[[Path], None] = lambda directory: None) -> None:
        """Write a checkpoint on rank 0.

        Args:
            state: what `restore` will return; plain values and tensors, which torch loads without running code.
            models: fills the checkpoint's directory with what is more than that, such as model directories.

        Raises:
            FloatingPointError: a weight is not finite; the checkpoint before stays the last one.
        """

        def write(directory: Path) -> None:
            models(directory)
            torch.save({**state, "step": self.step}, directory / STATE)

        self.require_finite()
        sync_mirrors()  # so that a restart from this checkpoint finds the metrics of all its steps
        number = self.checkpoints.save(write) if self.ranks.first else 0
        self._last = int(self.ranks.broadcast(number))

    def finish(self, write: Callable[[Path], None]) -> None:
        """Publish the stage's model: on rank 0 `write(directory)` fills the directory that makes the stage done.

        Raises:
            FloatingPointError: a weight is not finite; the stage is not done then.
        """
        self.require_finite()
        if self.ranks.first:
            with self.run.writing(self.stage) as directory:
                write(directory)
