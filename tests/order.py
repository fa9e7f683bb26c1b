"""The order of the test files: long ones first, so that no process of pytest-xdist works on alone at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

FIRST = (
    "e2e/test_golden.py",
    "e2e/test_rules.py",
    "ray/test_coordinator.py",
    "e2e/test_interrupt.py",
    "ray/test_sft.py",
    "ray/test_workers.py",
    "ray/test_monitoring.py",
    "ray/test_learner.py",
)
"""The longest files. The first makes the run that most of `tests/e2e` waits for (see `finished` there), and the two
after it, which wait for nothing, keep the other process at work meanwhile."""
GROUPS = ("ray", "e2e", "oracles", "unit")
"""All other files, by their directory. Those of `unit` are the shortest: both processes end with them together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; the tests of a file, and files of the same place, stay in their order."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(FIRST)}
    groups = {tests / name: len(FIRST) + place for place, name in enumerate(GROUPS)}
    items.sort(key=lambda item: places.get(item.path, groups.get(item.path.parent, len(FIRST))))
