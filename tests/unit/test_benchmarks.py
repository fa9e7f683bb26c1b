"""The benchmarks' own arithmetic; tests/oracles has some of their contestants."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Child, Stopwatch, alternate, column, rounded, with_earlier_cases
from benchmarks.results import Comparison
from benchmarks.tables import as_markdown, comparison_table, interval, write_docs
from benchmarks.workload import CONTEXT, EQUAL, RESPONSE, draw, prompts
from tests.contestant import Counter


def counter(start: float) -> Callable[[], Child]:
    return partial(Child, Counter, start, threads=1)


def record(**changes: Any) -> dict[str, Any]:
    machine = {
        "cpu": "a CPU", "cores": 2, "memory_gib": 4.0, "gpu": None, "python": "3.11", "versions": {"torch": "2"},
        "revision": "abc", "load_average_at_start": 0.0,
    }  # fmt: skip
    empty: dict[str, Any] = {"settings": {}, "comparisons": [], "facts": [], "phases": {}, "not_run": None}
    return {"benchmark": "some", "machine": machine, "seconds": 3} | empty | changes


def test_contestants_take_turns_and_their_errors_come_back() -> None:
    measured = alternate({"a": counter(0.0), "b": counter(10.0)}, [1, 2, 3])
    assert column(measured["a"], "value") == [1.0, 2.0, 3.0]
    assert column(measured["b"], "value") == [11.0, 12.0, 13.0]
    with pytest.raises(RuntimeError, match="turn seven"):
        alternate({"a": counter(0.0)}, [7])


def test_cases_that_were_not_measured_again_are_kept_and_named() -> None:
    def measured(case: str, value: float) -> dict[str, Any]:
        return {"case": case, "ours": [value]}

    earlier = record(
        settings={"one": "old", "two": "old"}, comparisons=[measured("one", 1.0), measured("two", 2.0)],
        facts=[{"name": "one: speed", "values": [1.0]}], phases={"one": {}, "two": {}},
    )  # fmt: skip
    later = record(settings={"one": "new"}, comparisons=[measured("one", 3.0)], phases={"one": {"rayrlhf": {}}})
    merged = with_earlier_cases(later, earlier)
    assert merged["settings"] == {"one": "new", "two": "old", "not measured again": "two: of revision abc"}
    assert merged["comparisons"] == [measured("one", 3.0), measured("two", 2.0)]
    assert merged["facts"] == earlier["facts"] and merged["phases"] == {"one": {"rayrlhf": {}}, "two": {}}
    again = record(comparisons=[measured("one", 3.0), measured("two", 4.0)])
    assert "not measured again" not in with_earlier_cases(again, earlier)["settings"]


def test_ratios_and_targets() -> None:
    """The ratio is of the medians, its range that of the turns."""
    faster = Comparison("case", "samples/s", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0], "other", at_least=1.3)
    assert faster.ratio == pytest.approx(4.0 / 3.0)
    assert faster.ratios == pytest.approx([2.0, 3.0, 1.0])
    assert faster.target == "at least 1.3: met"
    assert Comparison("case", "s", [2.0], [1.0], "other", at_most=1.3).target == "at most 1.3: missed"
    assert Comparison("case", "s", [2.0], [1.0], "other").target == "–"
    assert comparison_table([faster]).splitlines()[-1] == (
        "| case | 4 [2, 9] samples/s | 3 [1, 4] samples/s | other | **1.33** [1.00, 3.00] | at least 1.3: met |"
    )


def test_numbers() -> None:
    assert interval([1.23456]) == "1.23"
    assert interval([1500.0, 0.5, 20.0]) == "20 [0.5, 1,500]"
    assert rounded({"a": [1.23456789, (2, 0.000123456789)]}) == {"a": [1.2346, [2, 0.00012346]]}


def test_a_result_replaces_what_stands_between_its_markers(tmp_path: Path) -> None:
    docs, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    (results / "some.json").write_text(json.dumps(record(not_run="no GPU")), encoding="utf-8")
    docs.write_text("above\n<!-- bench:some -->\nold\n<!-- end -->\nbelow\n", encoding="utf-8")
    write_docs(docs, results)
    once = docs.read_text(encoding="utf-8")
    assert "Not run: no GPU." in once and "old" not in once
    assert once.startswith("above\n") and once.endswith("<!-- end -->\nbelow\n")
    write_docs(docs, results)
    assert docs.read_text(encoding="utf-8") == once
    docs.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="bench:some"):
        write_docs(docs, results)


def test_tables_have_what_was_measured() -> None:
    comparison = {"case": "c", "unit": "s", "ours": [1.0], "theirs": [2.0], "against": "x"}
    text = as_markdown(record(comparisons=[comparison], facts=[{"name": "f", "unit": "GiB", "values": [3.0]}]))
    assert "| c | 1 s | 2 s | x | **0.50** [0.50, 0.50] | – |" in text
    assert "| f | 3 | GiB |" in text


def test_the_stopwatch_sums_by_phase() -> None:
    class Worker:
        def work(self, kind: str) -> str:
            return kind

    clock = Stopwatch()
    clock.around(Worker, "work", lambda worker, kind: None if kind == "c" else kind)
    assert [Worker().work(kind) for kind in ("a", "b", "a", "c")] == ["a", "b", "a", "c"]
    found = clock.take()
    assert found.keys() == {"a", "b"} and all(seconds > 0 for seconds in found.values())
    assert clock.take() == {}


# Tokenises all posts, uncut.
@pytest.mark.long
def test_draws_are_those_that_the_tables_name() -> None:
    assert draw("capped", 8, 1) == draw("capped", 8, 1) != draw("capped", 8, 2)
    assert {len(prompt.ids) for prompt in draw("equal", 64, 0)} == {EQUAL}
    longest = {name: max(len(prompt.ids) for prompt in prompts(name)) for name in ("capped", "uncapped")}
    assert 500 < longest["capped"] <= 512 < longest["uncapped"] <= CONTEXT - RESPONSE
