"""The documented commands as a user types them, and one finished run that many tests look at."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import ray
from filelock import FileLock

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart.yaml"
SHRUNKEN = [
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

    def __init__(self, arguments: list[str], directory: Path) -> None:
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


Start = Callable[..., Command]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start("rayrlhf", "run", ...)` or `start("python", "-m", ...)`: this environment's commands, from the root."""
    directory, commands = tmp_path_factory.mktemp("output"), []

    def start_command(program: str, *arguments: str) -> Command:
        command = Command([str(Path(sys.executable).parent / program), *arguments], directory)
        commands.append(command)
        return command

    yield start_command
    for command in commands:
        command.end()


@pytest.fixture(scope="session")
def start_head(start: Start) -> Start:
    """`start_head(option, ...)`: a head of two CPUs that is up.

    Ray gives a node 30 s to start, which a busy machine may exceed: there are three tries.
    """

    def start_one(*options: str) -> Command:
        head = start("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *options)
        head.wait_until(
            lambda: head.process.poll() is not None or head.says("Ray runtime started"), "the head is up", running=False
        )
        return head

    def start_patiently(*options: str) -> Command:
        for _ in range(2):
            head = start_one(*options)
            if head.process.poll() is None:
                return head
            head.end()
        return start_one(*options)

    return start_patiently


@dataclass(frozen=True)
class FinishedRun:
    path: Path
    outcome: Outcome
    arguments: list[str]
    """What follows `rayrlhf run`."""

    def copy_before_rl(self, runs_dir: Path) -> Path:
        """A copy of the run in `runs_dir`, as it was when PPO began."""
        run = runs_dir / self.path.name
        shutil.copytree(self.path, run)
        shutil.rmtree(run / "policy")
        for name in ("evaluation.json", "samples.parquet", "report.html"):
            (run / name).unlink()
        metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in metrics if '"stage": "rl"' not in line))
        return run


@pytest.fixture(scope="session")
def finished(start: Start, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The shrunken quick start, run once, also for all processes of pytest-xdist.

    Tests only look at it. A test that changes it makes a copy.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all processes
    runs, record = shared / "finished", shared / "finished.json"
    arguments = [QUICKSTART, f"runs_dir={runs}", "name=quick", *SHRUNKEN]
    with FileLock(shared / "finished.lock"):
        if not record.exists():
            outcome = start("rayrlhf", "run", *arguments).wait()
            record.write_text(json.dumps(asdict(outcome)))
    outcome = Outcome(**json.loads(record.read_text()))
    assert outcome.code == 0, f"{outcome.out[-3000:]}\n{outcome.err[-3000:]}"
    return FinishedRun(runs / "quick", outcome, arguments)


@pytest.fixture
def before_rl(finished: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the finished run as it was when PPO began."""
    return finished.copy_before_rl(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def no_ray() -> None:
    """Commands start clusters of their own, and stages that run in this process are not to find one."""
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test may wait for several commands, each of which says itself that it hangs."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(3 * HANGS_S))
