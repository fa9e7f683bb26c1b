"""CPU seconds until `rayrlhf` answers: help, a look at runs, and mistakes in a config; and what each of them imports.

CPU time, user and system, of the command's process and its children, since a shared machine changes the time on the
clock. Help, runs and mistakes are to take at most 1 s each. The import tree is that of `python -X importtime`: for each
package the time of its import with everything that it imports first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import main
from benchmarks.results import ROOT, Fact, Result

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
CASES: tuple[tuple[str, ...], ...] = (
    ("--help",),
    ("run", "--help"),
    ("submit", "--help"),
    ("runs",),
    ("config", QUICKSTART),
    ("rl", QUICKSTART, "rl.stepz=3"),
    ("run", "nowhere.yaml"),
    ("sweep", "nowhere.yaml"),
)
REPEATS, SHOWN = 3, 8
LIMIT_S = 1.0
_IMPORT = re.compile(r"import time: *\d+ \| *(\d+) \| ( *)(\S+)")


def run(quick: bool) -> Result:
    """Measure every case in a fresh folder with one run in it."""
    facts, trees = [], {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory, "runs", "one")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("name: one\n", encoding="utf-8")
        for case in CASES:
            command = " ".join(["rayrlhf", *(Path(word).name for word in case)])
            seconds = [cpu_seconds(case, directory) for _ in range(1 if quick else REPEATS)]
            facts.append(Fact(f"`{command}`", "s of CPU", seconds))
            found = imports(case, directory)
            trees[command] = found
            print(
                f"{command}: {sorted(seconds)[len(seconds) // 2]:.2f} s of CPU; imports, milliseconds with all below:"
            )
            for name, depth, milliseconds in largest(found):
                print(f"  {milliseconds:7.1f}  {'  ' * depth}{name}")
    named = {
        command: ", ".join(f"{n} {ms:.0f}" for n, depth, ms in largest(t) if depth <= 1) for command, t in trees.items()
    }
    settings = {
        "limit": f"{LIMIT_S:g} s of CPU each",
        "largest imports of `rayrlhf --help`, ms on the clock": named["rayrlhf --help"],
        "of `rayrlhf runs`": named["rayrlhf runs"],
    }
    return Result(settings, facts=facts)


def cpu_seconds(case: tuple[str, ...], directory: str) -> float:
    """User and system time of one call."""
    process = subprocess.Popen(
        _python(case), cwd=directory, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime


def imports(case: tuple[str, ...], directory: str) -> list[tuple[str, int, float]]:
    """Module, depth in the tree and milliseconds with all that it imports; parents before children."""
    done = subprocess.run(
        _python(case, "-X", "importtime"),
        cwd=directory,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    # Python prints a module when its import ends, after those below it.
    lines = [match for line in done.stderr.splitlines() if (match := _IMPORT.match(line))]
    return [(match[3], len(match[2]) // 2, int(match[1]) / 1000) for match in reversed(lines)]


def largest(found: list[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """The modules that take longest, in the order of the tree."""
    least = sorted((milliseconds for _, _, milliseconds in found), reverse=True)[:SHOWN][-1]
    return [each for each in found if each[2] >= least]


def _python(case: tuple[str, ...], *flags: str) -> list[str]:
    return [sys.executable, *flags, "-c", "from jobs.cli import main; main()", *case]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main("command")
