"""Known vulnerabilities of the versions in constraints*.txt, as the package index knows them.

    python scripts/audit.py PIP_AUDIT LIST...

PIP_AUDIT is the program, LIST are files of pinned versions; options behind `--` go to the program. Only names and
versions are asked for, and nothing is installed. The exit code is 1 if a version has a known vulnerability, and also if
the index does not know a version: pip-audit alone would then say that it has found nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHOWN = 5
"""Names in a line that counts packages."""


def asked(program: str, listed: str, options: list[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each version in the text of a list.

    Raises:
        RuntimeError: it said nothing, for instance since the index does not answer.
    """
    with tempfile.TemporaryDirectory() as directory:
        pinned = Path(directory, "pinned.txt")
        pinned.write_text(listed.replace("+cpu", ""), encoding="utf-8")  # the index knows torch without it
        command = [program, "--disable-pip", "--no-deps", "--format", "json", "--requirement", str(pinned), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise RuntimeError(f"pip-audit ended with {done.returncode}: {done.stderr[-1000:]}") from None
    return found


def told(found: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Lines about the versions of a list, and whether all of them are known and have no known vulnerability."""
    lines, unknown = [], [each["name"] for each in found if "skip_reason" in each]
    for each in found:
        for vulnerability in each.get("vulns", ()):
            names = ", ".join([vulnerability["id"], *vulnerability.get("aliases", ())])
            mended = ", ".join(vulnerability["fix_versions"]) or "none yet"
            lines.append(f"{each['name']} {each['version']}: {names}; mended in {mended}")
    vulnerable = len(lines)
    if unknown:
        more = "" if len(unknown) <= SHOWN else ", ..."
        lines.append(
            f"{len(unknown)} of {len(found)} versions are unknown to the index, and nobody has looked at them: "
            f"{', '.join(unknown[:SHOWN])}{more}; ask an index that has pypi.org's JSON interface"
        )
    lines.append(f"{len(found) - len(unknown)} versions looked at, {vulnerable} known vulnerabilities")
    return lines, not vulnerable and not unknown


def main() -> int:
    program, *files = sys.argv[1:]
    files, options = (files[: files.index("--")], files[files.index("--") + 1 :]) if "--" in files else (files, [])
    fine = True
    for name in files:
        try:
            lines, good = told(asked(program, Path(name).read_text(encoding="utf-8"), options))
        except RuntimeError as error:
            lines, good = [str(error)], False
        print(f"{name}:", *lines, sep="\n  ", flush=True)
        fine &= good
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
