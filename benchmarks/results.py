"""The result of a benchmark, and the folder that keeps it as JSON; the harness and the tables both need them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Measurement = dict[str, float]
"""The figures of one turn of a contestant, by name."""


@dataclass(frozen=True)
class Comparison:
    """One row of a table: ours beside theirs, turn by turn."""

    case: str
    unit: str
    ours: list[float]
    theirs: list[float]
    against: str
    at_least: float | None = None
    """Target of ours / theirs, where more is better."""
    at_most: float | None = None
    """Target of ours / theirs, where less is better."""

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def ratios(self) -> list[float]:
        """Turn by turn: what was equal in a turn (data, load of the machine) is equal in its ratio."""
        return [own / other for own, other in zip(self.ours, self.theirs, strict=True)]

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:g}: {'met' if self.ratio >= self.at_least else 'missed'}"
        if self.at_most is not None:
            return f"at most {self.at_most:g}: {'met' if self.ratio <= self.at_most else 'missed'}"
        return "–"


@dataclass(frozen=True)
class Fact:
    """One measured thing that is compared with nothing."""

    name: str
    unit: str
    values: list[float]


@dataclass(frozen=True)
class Result:
    """The result of a benchmark. `settings` are the conditions: shared by all contestants, or said of which."""

    settings: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    phases: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    """case -> contestant -> median seconds by phase."""
    not_run: str | None = None
    """Why there are no figures."""
