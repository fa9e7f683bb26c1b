"""Configs of any content: a config, or one line that says what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from rayrlhf.config_file import dump_config, load_config
from rayrlhf.config_origins import annotated
from rayrlhf.sweeps.plan import load_sweep
from rayrlhf.yaml_text import read_yaml_text, write_yaml_text
from tests.fuzz import CASES, ODD, damaged, said_of, try_cases

ROOT = Path(__file__).parents[2]
FILES = {path: path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))}
SWEEPS = {
    path: path.read_bytes().replace(b"../quickstart.yaml", str(ROOT / "configs/quickstart.yaml").encode())
    for path in sorted((ROOT / "configs/sweeps").glob("*.yaml"))
}
NUMBERS = (".inf", "-.inf", ".nan", "-1", "0", "1", "2", "1e400", "1e-400", "4294967296", "9" * 400, "0.5", "1.0000001")
TEXTS = (
    "null",
    "true",
    "yes",
    "1:30",
    "''",
    '"\\ud83d"',
    '"\\0"',
    "[]",
    "{}",
    "[1, x]",
    "{x: 1}",
    "&a [*a]",
    "!!python/none",
)


def keys_of(tree: Any, prefix: str = "") -> list[str]:
    """The dotted keys of a config, sections included."""
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += keys_of(value, f"{prefix}{key}.")
    return found


KEYS = keys_of(dump_config(load_config(ROOT / "configs/quickstart.yaml")))


@st.composite
def overrides(draw: Any) -> list[str]:
    """Values for keys that there are, for a few that there are not, and text that is no override."""
    key = st.sampled_from([*KEYS, "x", "rl.x", "rl.steps.x", "rewards.0", ""])
    value = st.sampled_from([*NUMBERS, *TEXTS]) | st.text(max_size=10)
    made = [f"{draw(key)}={draw(value)}" for _ in range(draw(st.integers(0, 3)))]
    return made + draw(st.sampled_from([[], [], [], ["x"], ["=1"], ["a.b.c.d=1"]]))


@st.composite
def texts(draw: Any, files: dict[Path, bytes]) -> bytes:
    """A config of the project with a value changed, with a key twice, or damaged as a file."""
    content = files[draw(st.sampled_from(sorted(files)))]
    match draw(st.sampled_from(["whole", "value", "twice", "damaged"])):
        case "value":
            tree = read_yaml_text(content.decode())
            node, key = tree, draw(st.sampled_from(sorted(tree)))
            while isinstance(node[key], dict) and node[key] and draw(st.booleans()):
                node, key = node[key], draw(st.sampled_from(sorted(node[key])))
            node[key] = draw(st.sampled_from([value for value in ODD if value != 10**400]))
            return write_yaml_text(tree).encode()
        case "twice":
            lines = content.splitlines(keepends=True)
            return content + draw(st.sampled_from(lines))
        case "damaged":
            return damaged(content, draw)
        case _:
            return content


@CASES
def test_any_config_is_taken_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: int
) -> None:
    numbers = itertools.count()

    def check(case: tuple[bytes, list[str]]) -> None:
        path = tmp_path / f"{next(numbers)}.yaml"
        path.write_bytes(case[0])
        said_of(lambda: annotated(path, case[1]), capsys)
        path.unlink()

    try_cases(cases, check, st.tuples(texts(FILES), overrides()))


@CASES
def test_any_sweep_is_taken_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: int
) -> None:
    numbers = itertools.count()

    def check(content: bytes) -> None:
        path = tmp_path / f"{next(numbers)}.yaml"
        path.write_bytes(content)
        said_of(lambda: load_sweep(path, []), capsys)
        path.unlink()

    try_cases(cases, check, texts(SWEEPS))
