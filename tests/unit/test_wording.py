"""Wrong values, lists of names and messages of any length in one line."""

from __future__ import annotations

import pytest

from jobs.guard import guarded
from rayrlhf.errors import UserError
from rayrlhf.wording import LINE, in_a_line, names, shown


def test_what_is_short_stays_and_what_is_long_is_cut() -> None:
    assert [shown(value) for value in ("a", 7, None, [1])] == ["'a'", "7", "None", "[1]"]
    assert shown("x" * 10**6) == "'" + "x" * 59 + "…" and shown([7] * 10**4) == "[" + "7, " * 19 + "7,…"
    assert names(["a", "b"]) == "a, b" and names([]) == "none" and names(["x" * 200]) == "x" * 80 + "…"
    assert names([f"column {i}" for i in range(50)]).endswith(" and 42 more")


def test_a_line_has_its_beginning_and_its_end() -> None:
    assert in_a_line("a\nb\tc  d\x1b") == "a b c d\ufffd"
    line = in_a_line("a.csv line 3: " + "x" * 1000 + "; remove the row")
    assert len(line) == LINE and line.startswith("a.csv line 3: xx") and line.endswith("xx; remove the row")


def test_a_command_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise UserError("a.csv: no\ncolumn " + "x" * 1000 + "; rename one")

    assert guarded(wrong) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a.csv: no column x") and line.endswith("x; rename one") and len(line) == LINE
