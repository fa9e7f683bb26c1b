"""What a tracker does, and what is in a line of metrics.jsonl for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_NO_NUMBERS = ("stage", "step", "time")
_TEXTS = ("sample", "note", "warnings")


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked."""

    name: str
    address: str
    """Of its folder."""
    path: Path
    """The folder on this machine."""
    config: Mapping[str, Any]
    """As YAML has it."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation has found."""

    measures: Mapping[str, float]
    """Means by name, such as `evaluation/policy/gold`."""
    samples: Sequence[Mapping[str, Any]]
    """Rows of samples.parquet, of equal keys."""
    report: Path | None
    """report.html on this machine."""


class Tracker(Protocol):
    """A place that gets the metrics of one run, in the order in which they are written. One thread alone uses it."""

    def open(self, run: Tracked, known: str | None) -> str | None:
        """Begin, or go on.

        Args:
            run: what is tracked.
            known: what `open` returned the last time, when the run was interrupted; None at the first time.

        Returns:
            What names the run at the tracker; None if it needs no name.
        """
        ...

    def write(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl (`rayrlhf.runs.metrics`). After a restart, steps of a stage may come again."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """Take what the evaluation has found."""
        ...

    def close(self) -> None:
        """Hand over what is left. The run may be interrupted, and go on with another `open`."""
        ...


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line, by name."""
    return {
        name: float(value)
        for name, value in line.items()
        if name not in _NO_NUMBERS and isinstance(value, int | float) and not isinstance(value, bool)
    }


def staged_numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The same, each name under its stage's: `time/step` is measured in several, which all count steps from 1.

    >>> staged_numbers_of({"stage": "rl", "step": 1, "time": 0.0, "rl/kl": 0.5, "time/step": 2})
    {'rl/kl': 0.5, 'rl/time/step': 2.0}
    """
    stage = line["stage"]
    return {n if n.startswith(f"{stage}/") else f"{stage}/{n}": value for n, value in numbers_of(line).items()}


def texts_of(line: Mapping[str, Any]) -> dict[str, str]:
    """What a line has to read, by name, as Markdown."""
    found = {}
    for name in _TEXTS:
        text = line.get(name)
        if isinstance(text, Mapping):
            found[name] = "\n\n".join(f"**{key}**: {value}" for key, value in text.items())
        elif isinstance(text, str):
            found[name] = text
        elif text:
            found[name] = "\n\n".join(text)
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a config by dotted key.

    >>> flat({"rl": {"steps": 3}, "seed": 0})
    {'rl.steps': 3, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
