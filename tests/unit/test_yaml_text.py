"""YAML text by the rules of YAML 1.2, and what no config may be."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.yaml_text import MAX_DEPTH, MAX_DIGITS, MAX_NODES, read_yaml_text, write_yaml_text

LAUGHS = "x0: &x0 [1]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
"""A dozen lines that stand for 9 to the power of 11 values."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # Section 10.3.2 of YAML 1.2.2, and beside it what YAML 1.1 makes of the same text.
        ("true", True), ("FALSE", False), ("yes", "yes"), ("on", "on"), ("NO", "NO"),
        ("", None), ("~", None), ("Null", None), ("nUll", "nUll"),
        ("12", 12), ("-12", -12), ("+12", 12), ("012", 12), ("0o14", 12), ("0xC", 12), ("1_2", "1_2"), ("0b1", "0b1"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("9" * MAX_DIGITS, int("9" * MAX_DIGITS)),
        ("3e-6", 3e-6), ("3.0E+2", 300.0), (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf), (".INF", math.inf),
        ("inf", "inf"), ("1e", "1e"), (".", "."), ("'12'", "12"), ('"true"', "true"), ("!!str 12", "12"),
        ("[1, a]", [1, "a"]), ("{on: 1, y: 2}", {"on": 1, "y": 2}),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = read_yaml_text(text)
    assert found == value and type(found) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(read_yaml_text(".nan"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' stands twice in one mapping; keep one"),
        ("b: {a: 1, 'a': 2}", "line 1: key 'a' stands twice in one mapping; keep one"),
        ("a: 0\n1: 2", "line 2: key '1' is no text"),
        ("null: 2", "line 1: key 'null' is no text"),
        ("? [1]\n: 2", r"line 1: key '\[...\]' is no text"),
        ("a: &a [*a]", "an anchor contains itself"),
        (LAUGHS, f"its aliases stand for more than {MAX_NODES:,} values"),
        ("[" * 5000 + "]" * 5000, f"more than {MAX_DEPTH} mappings and lists inside each other"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} mappings and lists inside each other"),
        ("a: " + "9" * (MAX_DIGITS + 1), f"line 1: a number of {MAX_DIGITS + 1} digits"),
        ("a: [1", "line 1: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 2", "line 2: but found another document"),
        ("a: !!python/object:os.system b", "line 1: could not determine a constructor for the tag"),
        ("a\x00b", "unacceptable character #x0000"),
    ],
)
def test_what_no_file_may_be_is_one_line(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^{fault}") as raised:
        read_yaml_text(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) <= 300


_SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text()
_AMBIGUOUS = st.sampled_from(["yes", "1:30", "012", "0o14", "3e6", "1_0", "~", "", "<<", "=", "2024-01-01", "- a"])


@given(
    st.recursive(_SCALARS | _AMBIGUOUS, lambda inner: st.lists(inner) | st.dictionaries(st.text() | _AMBIGUOUS, inner))
)
def test_what_is_written_is_read_again(value: Any) -> None:
    """A config of record has to be the config."""
    assert read_yaml_text(write_yaml_text(value)) == value
