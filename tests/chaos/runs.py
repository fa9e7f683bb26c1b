"""A run of the quick start that meets faults, and is started again until it is finished."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.ledger import read_ledger
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.stages import STAGES
from tests.chaos.faults import Fault, strike
from tests.chaos.nodes import Nodes
from tests.commands import QUICKSTART, SHRUNKEN, Command

STARTS = 12
"""More starts than a run of five faults can need: after so many it does not get over one of them."""
LINGER_S = 180
"""Processes of a command that was killed end by themselves; on a busy machine it takes them that long at most."""
DISK_MIB = 3000
"""Two undisturbed runs, and one that meets faults, with all their checkpoints."""


class Run:
    """One run folder, and the commands that work on it one after the other."""

    def __init__(
        self,
        runs_dir: Path,
        name: str,
        changes: Sequence[str],
        environment: Mapping[str, str] = MappingProxyType({}),
        on_nodes: bool = False,
    ) -> None:
        """
        Args:
            changes: of the config.
            environment: variables that its processes have besides those of this one.
            on_nodes: whether it is on a cluster of several nodes, not on one of its own.
        """
        self._environment = environment
        self.path = runs_dir / name
        self.arguments = ["run", QUICKSTART, f"runs_dir={runs_dir}", f"name={name}", *SHRUNKEN, *changes]
        self.seconds = 0.0
        """From the first start to the end of the last one."""
        self.left: list[str] = []
        """Command lines of processes that did not end with their command."""
        self._logs = runs_dir.parent / f"{name}.output"
        self._nodes = Nodes(self._logs, environment) if on_nodes else None

    def to_the_end(
        self,
        faults: Sequence[Fault] = (),
        chance: random.Random | None = None,
        stage_seconds: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Run the command, again whenever it ends early, with the faults on the way.

        Args:
            faults: at most one a stage.
            chance: decides what the faults leave open.
            stage_seconds: how long each stage takes undisturbed.

        Returns:
            A record of each fault that had something to strike.

        Raises:
            AssertionError: the run did not end.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            return self._to_the_end(faults, chance, stage_seconds)
        finally:
            if self._nodes:
                self._nodes.end()

    def _to_the_end(
        self, faults: Sequence[Fault], chance: random.Random | None, stage_seconds: Mapping[str, float] | None
    ) -> list[dict[str, Any]]:
        waiting, records = {fault.stage: fault for fault in faults}, list[dict[str, Any]]()
        began: float | None = None
        for _ in range(STARTS):
            command = self._start()
            began = began or time.monotonic()
            try:
                while command.process.poll() is None:
                    time.sleep(0.2)
                    self._follow(records)
                    fault = waiting.pop(_stage_of(command), None)
                    if fault:
                        assert chance and stage_seconds
                        if _still_in(command, fault.stage, fault.moment * stage_seconds[fault.stage]):
                            records += self._meet(fault, command, chance)
                self._follow(records)
                self._wait_for_processes(command)
                if command.process.returncode == 0:
                    self.seconds = time.monotonic() - began
                    return records
                for record in records:
                    if record["recovered_s"] is None:
                        record["ended"] = f"{command.process.returncode}: {_last_line(command)}"
                _do_as_told(command)
            finally:
                command.end()
        raise AssertionError(f"{self.path} did not end in {STARTS} starts; see {self._logs}")

    def stage_seconds(self) -> dict[str, float]:
        """How long each finished stage took."""
        lines = read_metrics(self.path, "run")
        return {name.removeprefix("time/"): value for line in lines for name, value in line.items() if "time/" in name}

    def steps_done_again(self) -> int:
        """How many steps of `rl` were lost with something that died."""
        run = RunFolder(self.path)
        return run.trained.read_bytes().count(b"\n") - len(read_ledger(run))

    def delete(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path)

    def _meet(self, fault: Fault, command: Command, chance: random.Random) -> list[dict[str, Any]]:
        """Strike now, or as soon as there is something to strike; empty if the stage ends before."""
        while _still_in(command, fault.stage):
            progress, at = self._progress(), time.monotonic()
            struck = strike(fault, lambda: self._processes(command), self.path, chance, self._nodes)
            if struck is not None:
                break
            time.sleep(0.1)
        else:
            return []
        return [
            {
                "fault": str(fault), "stage": fault.stage, "kind": fault.kind, "role": fault.role, "struck": struck,
                "at": at, "progress": progress, "recovered_s": None, "ended": None,
            }
        ]  # fmt: skip

    def _follow(self, records: Sequence[dict[str, Any]]) -> None:
        """Note of each fault when the run is further than it was then."""
        for record in records:
            if record["recovered_s"] is None and self._progress() > record["progress"]:
                record["recovered_s"] = round(time.monotonic() - record["at"], 1)

    def _progress(self) -> tuple[int, int]:
        """Finished stages, and the step that was logged last of the stage under way."""
        done = [stage for stage in STAGES if (self.path / STAGES[stage].output).exists()]
        lines = [line for line in read_metrics(self.path) if line["stage"] in STAGES] if self.path.exists() else []
        return len(done), lines[-1]["step"] if lines and lines[-1]["stage"] not in done else 0

    def _start(self) -> Command:
        """The command, once the nodes that it is to be on are up."""
        address = {}
        if self._nodes:
            self._nodes.ready()
            address = {"RAY_ADDRESS": self._nodes.address}
        program = str(Path(sys.executable).parent / "rayrlhf")
        return Command([program, *self.arguments], self._logs, {**self._environment, **address})

    def _processes(self, command: Command) -> dict[int, str]:
        """Command lines of all that the command works with, by pid."""
        return command.processes() | (self._nodes.processes() if self._nodes else {})

    def _left(self, command: Command) -> dict[int, str]:
        """What should be gone once the command has ended, by pid: on nodes that stay, its actors."""
        return command.processes() | (self._nodes.actors() if self._nodes else {})

    def _wait_for_processes(self, command: Command) -> None:
        deadline = time.monotonic() + LINGER_S
        while self._left(command) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.left += self._left(command).values()


@contextlib.contextmanager
def limited_disk(directory: Path) -> Iterator[tuple[Path, bool]]:
    """A place for runs, and whether it is a disk of its own that can be filled: for that one has to be root."""
    place = directory / "runs"
    place.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], check=False).returncode == 0
    try:
        yield place, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def _stage_of(command: Command) -> str:
    """The stage that the command is in, by the heading that it has printed last; empty before the first."""
    text = command.output()
    headings = re.findall(r"^(\w+) ─", text, re.MULTILINE)
    return headings[-1] if headings and f"\n{headings[-1]}: done in" not in text else ""


def _still_in(command: Command, stage: str, seconds: float = 0.0) -> bool:
    """Wait so long; returns whether the command is in the stage then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and command.process.poll() is None:
        time.sleep(0.05)
    return command.process.poll() is None and _stage_of(command) == stage


def _last_line(command: Command) -> str:
    lines = [line for line in command.errors().strip().splitlines() if "asio_chaos" not in line]  # of a slow network
    return (lines or ["nothing"])[-1]


def _do_as_told(command: Command) -> None:
    """What the error line asks of its reader before the same command: to delete checkpoints that are all damaged."""
    if told := re.search(r"or delete (\S+) to start the stage anew", command.errors()):
        shutil.rmtree(told[1])
