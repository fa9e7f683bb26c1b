"""`make audit` looks at every pinned version, and says so of each that the index does not know.

A program that answers as pip-audit does stands in for it: no test asks the index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LISTS = ("constraints.txt", "constraints.gpu.txt")
STAND_IN = """
import json, os, re, sys
options, listed = sys.argv[1:-1], open(sys.argv[-1]).read()
with open(os.environ["ASKED"], "a") as file:
    file.write(f"{options}\\n{listed}")
pinned = re.findall(r"^([A-Za-z0-9._-]+)==(.*)", listed, re.M)
found = [{"name": name, "version": version, "vulns": []} for name, version in pinned]
unknown = int(os.environ["UNKNOWN"])
found[:unknown] = [{"name": each["name"], "skip_reason": "not found"} for each in found[:unknown]]
for each in found:
    if each["name"] == os.environ["VULNERABLE"]:
        each["vulns"] = [{"id": "PYSEC-2026-7", "aliases": ["CVE-2026-70"], "fix_versions": ["9.9"], "description": ""}]
print(json.dumps({"dependencies": found, "fixes": []}))
sys.exit(any(each.get("vulns") for each in found))
"""


def audited(tmp_path: Path, unknown: int = 0, vulnerable: str = "", answers: str = STAND_IN) -> tuple[int, str, str]:
    """Exit code and output of the recipe's last line, and what the program was asked."""
    program, asked = tmp_path / "pip-audit", tmp_path / "asked"
    program.write_text(f"#!{sys.executable}\n{answers}")
    program.chmod(0o755)
    asked.write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/audit.py", program, *LISTS],
        cwd=ROOT,
        env=os.environ | {"ASKED": str(asked), "UNKNOWN": str(unknown), "VULNERABLE": vulnerable},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, asked.read_text()


def test_every_pinned_version_is_asked_for_every_night(tmp_path: Path) -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/nightly.yaml").read_text())["jobs"]
    assert [step["run"] for step in jobs["audit"]["steps"] if "run" in step] == ["make audit"]
    assert f"scripts/audit.py build/audit/bin/pip-audit {' '.join(LISTS)} -- $(ARGS)" in (ROOT / "Makefile").read_text()
    code, said, asked = audited(tmp_path)
    pinned = [line for name in LISTS for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in asked.splitlines() if not line.startswith("[")]
    assert code == 0 and lines == [line.removesuffix("+cpu") for line in pinned]
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert said.count("versions looked at, 0 known vulnerabilities") == len(LISTS)


def test_a_vulnerability_is_named_and_fails(tmp_path: Path) -> None:
    code, said, asked = audited(tmp_path, vulnerable="torch")
    assert code == 1 and len(re.findall("torch .*: PYSEC-2026-7, CVE-2026-70; mended in 9.9", said)) == len(LISTS)
    assert asked.count("[") == len(LISTS), "the second list is looked at although the first has something"


def test_versions_that_the_index_does_not_know_fail(tmp_path: Path) -> None:
    """Seen with a mirror of the index: pip-audit found nothing, since it was told nothing, and ended with 0."""
    code, said, _ = audited(tmp_path, unknown=7)
    assert code == 1 and re.search(r"7 of \d+ versions are unknown to the index, .*, \.\.\.;", said)


def test_no_answer_fails(tmp_path: Path) -> None:
    code, said, _ = audited(tmp_path, answers="import sys\nsys.exit('the index does not answer')")
    assert code == 1 and "pip-audit ended with 1: the index does not answer" in said
