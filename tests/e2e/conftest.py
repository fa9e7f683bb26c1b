"""The documented commands as a user types them, and one finished run that many tests look at."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import ray
from filelock import FileLock

from tests.commands import HANGS_S, QUICKSTART, SHRUNKEN, Command, Outcome

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
