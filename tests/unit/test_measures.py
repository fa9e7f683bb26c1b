"""The table of measures: that it names what is measured, once, and imports nothing that is slow to load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rayrlhf.reports.measures import EVALUATED, PANELS, STEP_MEASURES, Measure, interval_text
from rayrlhf.sweeps.plan import METRICS


def test_a_measure_has_one_row() -> None:
    names = [measure.name for stage in PANELS.values() for panel in stage for measure in panel.measures]
    assert len(names) == len(set(names)) == len(STEP_MEASURES)
    for stage, panels in PANELS.items():
        titles = [panel.title for panel in panels]
        assert len(titles) == len(set(titles))
        for measure in (measure for panel in panels for measure in panel.measures):
            assert measure.name.startswith((f"{stage}/", "time/", "throughput/"))


def test_what_is_computed_has_words() -> None:
    assert {metric.split(".")[1] for metric in METRICS} <= set(EVALUATED)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (".3f nats", 1.5, "1.500 nats"),
        (".0%", 0.75, "75%"),
        (",.0f tok/s", 1234.5, "1,234 tok/s"),
        (".4f", None, "n/a"),
        (".3f nats", float("nan"), "n/a nats"),
    ],
)
def test_text_of_a_value(form: str, value: float | None, text: str) -> None:
    assert Measure("any", "any", form).text(value) == text


def test_text_of_an_interval() -> None:
    assert interval_text({"mean": -0.0001, "low": -0.25, "high": 0.25}) == "0.000 [-0.250, 0.250]"
    assert interval_text({"mean": 31.25, "low": 9.0, "high": 40.0}) == "31.2 [9.0, 40.0]"
    assert interval_text(None) == "–"


def test_it_is_loaded_at_once() -> None:
    """`rayrlhf status` and `rayrlhf runs` read the table."""
    code = "import sys; import rayrlhf.reports.measures; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert not {"numpy", "scipy", "pyarrow", "matplotlib", "torch", "rich"} & set(loaded.split())
