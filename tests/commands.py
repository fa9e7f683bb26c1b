"""The documented commands as a user types them, each with all processes that it starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.yaml"
SHRUNKEN = [
    "model.path=embedded:opt-tiny",
    "reward_model.from=null",
    "reward_model.optimizer.lr=4e-4",
    "data.max_prompt_tokens=96",
    "data.max_response_tokens=40",
    "sft.batch_size=32",
    "sft.max_demonstrations=96",
    "sft.epochs=1",
    "sft.eval_prompts=8",
    "collect.labeller.measure=rouge_l",
    "collect.prompts=24",
    "collect.heldout_fraction=0.15",
    "reward_model.epochs=1",
    "reward_model.prompts_per_batch=16",
    "rl.steps=3",
    "rl.prompts_per_step=8",
    "rl.samples_per_prompt=2",
    "rl.epochs=2",
    "rl.optimizer.lr=3e-4",
    "evaluate.temperature=0.01",
    "evaluate.max_prompts=16",
    "resources.dashboard=false",
    "resources.learner.threads=1",
]
"""The quick start with every stage cut to a few steps."""
MARK = "RAYRLHF_TEST_COMMAND"
HANGS_S = 1500
"""A command that takes longer hangs: this is far beyond what a busy machine needs, and no test is about speed."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float


class Command:
    """A command under way in a session of its own, with all processes that it starts."""

    def __init__(
        self, arguments: list[str], directory: Path, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """
        Args:
            directory: where its output goes.
            environment: variables besides those of this process.
        """
        self.mark = uuid.uuid4().hex
        self.ray_directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds Unix sockets
        self._out, self._err = directory / f"{self.mark}.out", directory / f"{self.mark}.err"
        self._started = time.monotonic()
        self.arguments = arguments
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={
                    **os.environ,
                    **environment,
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs call `python`
                    "RAY_TMPDIR": str(self.ray_directory),
                    MARK: self.mark,
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )

    def wait(self) -> Outcome:
        """The finished command; a failed test if it hangs."""
        try:
            code = self.process.wait(HANGS_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.arguments} took more than {HANGS_S} s\n{self._texts()}")
        return Outcome(code, self._out.read_text(), self._err.read_text(), time.monotonic() - self._started)

    def wait_for_line(self, pattern: str) -> None:
        """Returns once a line of standard output matches from its start."""
        deadline = time.monotonic() + HANGS_S
        while not re.search(pattern, self._out.read_text(), re.MULTILINE):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.arguments}: no line {pattern!r}\n{self._texts()}")
            time.sleep(0.05)

    def wait_until(self, condition: Callable[[], bool], what: str, running: bool = True) -> None:
        """Returns once the condition holds; a failed test if the command ends first (unless not `running`)."""
        deadline = time.monotonic() + HANGS_S
        while not condition():
            ended = running and self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                pytest.fail(f"{self.arguments}: {'ended' if ended else 'waited'} before {what}\n{self._texts()}")
            time.sleep(0.5)

    def output(self) -> str:
        """What it has printed to standard output so far."""
        return self._out.read_text()

    def errors(self) -> str:
        """What it has printed to standard error so far."""
        return self._err.read_text()

    def says(self, text: str) -> bool:
        """Whether it has printed this to standard output."""
        return text in self.output()

    def processes(self) -> dict[int, str]:
        """Command lines of all living processes that descend from this command, by pid: their environment says so."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self.mark}".encode() in (directory / "environ").read_bytes().split(b"\0")
                alive = "\nState:\tZ" not in (directory / "status").read_text()
                if marked and alive:
                    found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # gone meanwhile, or not ours to read
        return found

    def end(self) -> None:
        """Kill whatever is left."""
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)
        self.process.wait()
        shutil.rmtree(self.ray_directory, ignore_errors=True)

    def _texts(self) -> str:
        return f"--- stdout\n{self._out.read_text()[-3000:]}\n--- stderr\n{self._err.read_text()[-3000:]}"


def _hear_ctrl_c() -> None:
    """A shell that starts these tests in the background has them ignore Ctrl-C, and commands inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
