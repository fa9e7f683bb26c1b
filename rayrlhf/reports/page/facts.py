"""How a run was made: its config beside the defaults, versions, contents of its files, and when its stages ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rayrlhf.config import Config
from rayrlhf.reports.progress import duration
from rayrlhf.runs.stages import STAGES
from rayrlhf.yaml_text import in_one_line


@dataclass(frozen=True)
class Setting:
    """A key of the config that is not at its default."""

    key: str
    value: str
    default: str
    """Empty for a key that has none."""


@dataclass(frozen=True)
class Bar:
    """When a stage ran, as shares of the run's time."""

    title: str
    left: float
    width: float
    seconds: str


def settings(config: BaseModel, beside: Any = None, prefix: str = "") -> Iterator[Setting]:
    """The keys of a config that differ from their defaults, in its order.

    Args:
        config: a section.
        beside: what its own section has as its default, which may be set otherwise than the class has it.
        prefix: of its keys.
    """
    for name, field in type(config).model_fields.items():
        key, value = f"{prefix}{field.alias or name}", getattr(config, name)
        default = field.get_default(call_default_factory=True, validated_data={})
        if type(beside) is type(config):
            default = getattr(beside, name)
        if isinstance(value, BaseModel):
            yield from settings(value, default, f"{key}.")
        elif value != default:
            yield Setting(
                key, in_one_line(_plain(value)), "" if default is PydanticUndefined else in_one_line(_plain(default))
            )


def own_settings(config: Config) -> list[Setting]:
    """As `settings`, without the folder of the run."""
    return [each for each in settings(config) if each.key != "runs_dir"]


def bars(metrics: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The stages of a run on one line of time, from the lines of stage `run`; none of a stage that is not done."""
    spans = [
        (stage.title, line["time"] - line[f"time/{stage.name}"], line["time"])
        for line in metrics
        if line["stage"] == "run"
        for stage in STAGES.values()
        if line.get(f"time/{stage.name}") is not None
    ]
    if not spans:
        return []
    start, end = min(span[1] for span in spans), max(span[2] for span in spans)
    whole = max(end - start, 1e-9)
    return [Bar(title, (a - start) / whole, (b - a) / whole, duration(b - a)) for title, a, b in spans]


def when(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The day and the hour of the last line, in UTC; empty before the first one."""
    times = [line["time"] for line in metrics if line.get("time")]
    return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M UTC") if times else ""


def hashes(contents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Key of the config, file and BLAKE2b hash of each file that the config names."""
    return [
        (key, name, str(entry.get("blake2b", "")))
        for key, found in contents.items()
        for name, entry in found.get("files", {}).items()
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
