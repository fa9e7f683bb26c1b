"""What pytest says of time: at once what failed or took long, and at the end one table of where the time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pytest

LONG_S = 20.0
"""A setup or a test that takes longer has a line of its own as it ends."""
SHOWN = 30
"""Tests of the table."""


class Told:
    """Says at once what failed, and which phases took long: the whole suite takes long, too."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called in the process that prints, also for tests of the other processes."""
        if report.failed or report.duration > LONG_S:
            terminal = self._config.pluginmanager.getplugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"{report.duration:8.1f}  {report.nodeid} ({report.when}) {report.outcome}")
            if report.failed:
                terminal.write_line(report.longreprtext[-4000:])


def pytest_configure(config: pytest.Config) -> None:
    """Not on a worker, which prints nothing."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Told(config))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The seconds of every group and the slowest tests, both slowest first; pytest's closing line comes after it."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds, with fixtures: a shared one counts for its first test")
        for line in table(seconds):
            terminalreporter.line(line)


def table(seconds: dict[str, float]) -> Sequence[str]:
    """Lines: groups with their number of tests, then the slowest tests."""
    groups: dict[str, list[float]] = defaultdict(list)
    for nodeid, own in seconds.items():
        groups[f"tests/{PurePosixPath(nodeid).parts[1]}"].append(own)
    rows = [(sum(own), f"{name}, {len(own)} tests") for name, own in groups.items()]
    slowest = sorted(((own, nodeid) for nodeid, own in seconds.items()), reverse=True)[:SHOWN]
    return [f"{own:8.1f}  {name}" for own, name in [*sorted(rows, reverse=True), *slowest]]
