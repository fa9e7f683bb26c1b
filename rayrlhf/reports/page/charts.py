"""The curves of report.html as data: the page's script draws them, and shows the same numbers as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rayrlhf.reports.curves import path_over_kl
from rayrlhf.reports.measures import PANELS, Measure, Panel, panels_of

Lines = Sequence[Mapping[str, Any]]
TIMES = ("time/", "throughput/", "idle/")
"""How the names of the measures begin that are not about learning but about the machine."""


@dataclass(frozen=True)
class Series:
    """One curve: a value for each x of its chart, None where there is none."""

    words: str
    values: list[float | None]
    low: list[float | None] | None = None
    """The lower limit of each value's 95 % interval."""
    high: list[float | None] | None = None
    role: str = ""
    """`proxy`, `gold` or `ideal`: drawn alike in all charts; empty for the next colour."""


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    unit: str
    x_words: str
    x: list[float]
    """Rising."""
    series: list[Series]
    kind: str = "lines"
    """`lines`, `stacked` (parts of a whole), `points` (joined, with intervals) or `bars`."""
    smooth: bool = True
    """Whether the page's smoothing applies."""
    sync: str = ""
    """Charts of one name share their cursor and zoom."""
    note: str = ""
    """A sentence below it."""

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "summary": self.summary}

    @property
    def summary(self) -> str:
        """The chart in words, for those who cannot see it."""
        return f"{self.title}. " + " ".join(_course(each, self.x, self.x_words) for each in self.series)


@dataclass
class Charts:
    """All charts of a page; each is found again by its place."""

    all: list[Chart] = field(default_factory=list)

    def add(self, charts: Iterable[Chart]) -> list[int]:
        """Take these in, and return their places."""
        first = len(self.all)
        self.all += charts
        return list(range(first, len(self.all)))


def stage_charts(stage: str, lines: Lines) -> list[Chart]:
    """The charts of what one stage learns, from its lines of metrics.jsonl; none of measures that were not written."""
    return [chart(panel, lines, stage) for panel in _panels(stage, lines) if not _about_time(panel)]


def time_charts(lines: Lines) -> list[Chart]:
    """Seconds by phase, throughput and idle shares over the steps of `rl`."""
    names = sorted({name for line in lines for name in line if name.startswith("idle/")})
    idle = Panel("Time without work", "share", tuple(Measure(name, name.partition("/")[2]) for name in names))
    panels = [panel for panel in _panels("rl", lines) if _about_time(panel)] + ([idle] if names else [])
    return [chart(panel, lines, "rl") for panel in panels]


def chart(panel: Panel, lines: Lines, sync: str) -> Chart:
    """A panel of measures over steps."""
    known = [line for line in lines if any(line.get(measure.name) is not None for measure in panel.measures)]
    series = [
        Series(measure.legend or measure.words, [line.get(measure.name) for line in known])
        for measure in panel.measures
        if any(line.get(measure.name) is not None for line in known)
    ]
    steps = [float(line["step"]) for line in known]
    return Chart(panel.title, panel.unit, "step", steps, series, "stacked" if panel.stacked else "lines", sync=sync)


def over_kl_chart(lines: Lines) -> Chart | None:
    """Proxy and gold against the square root of KL; None where the metrics lack one of them."""
    path = path_over_kl(lines)
    if path is None:
        return None
    series = []
    for (name, gain), role in zip(path.gains.items(), ("proxy", "gold"), strict=True):
        words = "gold" if "gold" in name else "proxy: reward model's score"
        low, high = gain.values - gain.half, gain.values + gain.half
        series.append(Series(words, _plain(gain.values), _plain(low), _plain(high), role))
    return Chart(
        "Proxy and gold against KL",
        "gain since the start, SDs",
        "√KL, KL in nats per response",
        _plain_x(path.root_kl),
        series,
        smooth=False,
        note="Where the two part, the reward model is over-optimised (Gao et al. 2023). Bands: 95 % over responses.",
    )


def _panels(stage: str, lines: Lines) -> list[Panel]:
    names = {name for line in lines for name, value in line.items() if value is not None}
    known = panels_of(stage, names) if stage in PANELS else ()
    return [panel for panel in known if names & {measure.name for measure in panel.measures}]


def _about_time(panel: Panel) -> bool:
    return panel.measures[0].name.startswith(TIMES)


def _plain(values: Iterable[float]) -> list[float | None]:
    return [float(value) if value == value else None for value in values]


def _plain_x(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values]


def _course(series: Series, x: Sequence[float], x_words: str) -> str:
    known = [(at, value) for at, value in zip(x, series.values, strict=True) if value is not None]
    if not known:
        return ""
    least, most = (pick(value for _, value in known) for pick in (min, max))
    name = x_words.partition(",")[0]
    first, last = (f"{value:.4g} at {name} {at:g}" for at, value in (known[0], known[-1]))
    return f"{series.words}: {first}, {last}; least {least:.4g}, most {most:.4g}."
