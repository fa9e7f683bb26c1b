"""Documents name files, functions, tests, config keys and each other: all of them must be there, in short lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from rayrlhf.config import Config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("tests/data/*.md")])
DETAILS = (ROOT / "docs/implementation_details.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`]+)`", DETAILS)
CODE = [q for q in QUOTED if re.match(r"(rayrlhf|actors|jobs)/\S+\.py\b", q)]
TESTS = [q for q in QUOTED if re.match(r"(unit|ray|e2e|oracles)/test_\w+(::\w+)?$|::test_\w+$", q)]
KEYS = [q for q in QUOTED if re.match(rf"({'|'.join(Config.model_fields)})\.[a-z]\w*(\.\w+)*(: .*)?$", q)]

FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"build", "runs"}
LONGEST = 140
SECOND_SENTENCE = re.compile(r"[a-z0-9`)\]%][.!?][*)]* (?=[A-Z*`\[])")


def lines(document: Path) -> Iterator[tuple[int, str, str]]:
    """Number, kind and text of each line. The kinds are prose, code, table, and generated (by the benchmarks)."""
    kind, fence = "prose", False
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("<!-- bench:"):
            kind = "generated"
        if line.lstrip().startswith("```"):
            fence = not fence
        inside = "code" if fence else "table" if line.startswith("|") else kind
        yield number, inside, line
        if line.startswith("<!-- end"):
            kind = "prose"


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and mkdocs.yml make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


@cache
def anchors(document: Path) -> set[str]:
    return {slug(line.lstrip("#")) for _, kind, line in lines(document) if kind == "prose" and line.startswith("#")}


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


# ---- every document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lines_are_short_and_hold_one_sentence(document: Path) -> None:
    long, double = [], []
    for number, kind, line in lines(document):
        if kind in ("prose", "code") and len(line) > LONGEST:
            long.append(number)
        words = re.sub(r"^(#+ )?(\d+\. )?", "", line.lstrip("> -")).replace("Dr. GRPO", "GRPO")
        if kind == "prose" and SECOND_SENTENCE.search(words):
            double.append(number)
    assert not long, f"{document.name}: lines over {LONGEST} characters: {long}"
    assert not double, f"{document.name}: lines with more than one sentence: {double}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_anchors_resolve(document: Path) -> None:
    broken = []
    for number, kind, line in lines(document):
        if kind in ("code", "generated"):
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+://", target):
                continue
            path, _, anchor = target.partition("#")
            there = (document.parent / path).resolve() if path else document
            if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
                broken.append(f"line {number}: {target}")
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_quoted_files_exist(document: Path) -> None:
    """`rayrlhf/algorithms/losses.py`, also with `::test` or `: function` behind it; `*` stands for any name.

    In code blocks, too: `rayrlhf run configs/quickstart.yaml`.
    """
    missing = []
    for number, kind, line in lines(document):
        if kind == "code":
            named = re.findall(r"(?<![\w./-])([a-z]+)(/[\w./-]+\.(?:yaml|py|md|sbatch|json))\b", line)
            missing += [
                f"line {number}: {top}{rest}"
                for top, rest in named
                if top in FOLDERS and not (ROOT / (top + rest)).exists()
            ]
        if kind in ("code", "generated"):
            continue
        for quoted in re.findall(r"`([^`]+)`", line):
            path = re.split(r"::|: |#", quoted)[0]
            of_ours = re.fullmatch(r"([\w.*-]+)/[\w./*-]*", path)
            if of_ours and of_ours[1] in FOLDERS and not list(ROOT.glob(path.rstrip("/"))):
                missing.append(f"line {number}: {quoted}")
    assert not missing


# ---- docs/implementation_details.md


def test_the_page_is_read() -> None:
    assert len(CODE) > 40 and len(TESTS) > 80 and len(KEYS) > 20


@pytest.mark.parametrize("code", sorted(set(CODE)))
def test_functions_exist(code: str) -> None:
    """`rayrlhf/algorithms/losses.py: clipped_surrogate, value_loss`."""
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
    sections: list[type[BaseModel]] = [Config]
    *parents, last = key.split(":")[0].split(".")
    for parent in parents:
        annotations = {
            section.model_fields[parent].annotation for section in sections if parent in section.model_fields
        }
        # `rl` is one of several sections, each in an Annotated with its name.
        options = [o for annotation in annotations for o in (annotation, *getattr(annotation, "__args__", ()))]
        options = [getattr(option, "__origin__", option) for option in options]
        sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        assert sections, parent
    assert any(last in section.model_fields for section in sections)
