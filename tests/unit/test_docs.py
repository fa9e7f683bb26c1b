"""docs/implementation_details.md names functions, tests and config keys: all of them must be there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from rayrlhf.config import Config

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r"`([^`]+)`", (ROOT / "docs/implementation_details.md").read_text(encoding="utf-8"))
CODE = [q for q in QUOTED if re.match(r"(rayrlhf|actors|jobs)/\S+\.py\b", q)]
TESTS = [q for q in QUOTED if re.match(r"(unit|ray|e2e|oracles)/test_\w+(::\w+)?$|::test_\w+$", q)]
KEYS = [q for q in QUOTED if re.match(rf"({'|'.join(Config.model_fields)})\.[a-z]\w*(\.\w+)*(: .*)?$", q)]


@cache
def names(path: Path) -> set[str]:
    """Functions, classes and `Class.method`s of a file, and the names it assigns at its top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            found |= methods | {f"{node.name}.{name}" for name in methods}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_the_page_is_read() -> None:
    assert len(CODE) > 40 and len(TESTS) > 80 and len(KEYS) > 20


@pytest.mark.parametrize("code", sorted(set(CODE)))
def test_functions_exist(code: str) -> None:
    """`rayrlhf/algorithms/losses.py: policy_loss, value_loss`."""
    path, _, wanted = code.partition(": ")
    assert (ROOT / path).is_file()
    if wanted:
        assert set(wanted.split(", ")) <= names(ROOT / path)


def test_tests_exist() -> None:
    """`unit/test_losses::test_a`, and `::test_b` of the file named last."""
    path, missing = ROOT, []
    for name in TESTS:
        file, _, test = name.partition("::")
        if file:
            path = ROOT / "tests" / f"{file}.py"
        if not path.is_file() or (test and test not in names(path)):
            missing.append(f"{path.stem}::{test}")
    assert not missing


@pytest.mark.parametrize("key", sorted(set(KEYS)))
def test_config_keys_exist(key: str) -> None:
    section: type[BaseModel] = Config
    *parents, last = key.split(":")[0].split(".")
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    assert last in section.model_fields
