"""Run tests many times beside a busy loop on every core, and count what passed.

    python scripts/repeat_tests.py tests/ray/test_node_loss.py tests/ray/test_pool.py
    python scripts/repeat_tests.py -n 3 --output /tmp/repeated -m long tests/e2e/test_jobs.py
    python scripts/repeat_tests.py --loops 0 tests/ray      # where other work keeps the cores busy already

A test that takes for granted how fast something is, or an order of events that it does not enforce, passes on an idle
machine and fails here sooner or later. The loops have the priority of the tests, so each test gets half of the cores.
What is not an option of this script goes to pytest. Prints one line a test (passed, failed and seconds of the slowest
time); the output of times that failed is kept in --output. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass
class Tally:
    """What came of one test so far."""

    passed: int = 0
    failed: int = 0
    longest_s: float = 0.0


def burn() -> None:
    """Keep one core busy until the process is ended."""
    while True:
        pass


def run_once(arguments: list[str], tallies: dict[str, Tally], log: Path) -> int:
    """Run pytest once and count its results; its exit code."""
    with tempfile.TemporaryDirectory() as directory:
        xml = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={xml}", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            log.write_text(done.stdout, encoding="utf-8")
        for case in ElementTree.parse(xml).iter("testcase") if xml.exists() else ():
            if case.find("skipped") is not None:
                continue
            tally = tallies[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"]
            if case.find("failure") is None and case.find("error") is None:
                tally.passed += 1
            else:
                tally.failed += 1
            tally.longest_s = max(tally.longest_s, float(case.get("time", 0)))
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", dest="times", type=int, default=10, help="how many times (default: 10)")
    parser.add_argument("--output", type=Path, default=Path("build/repeated"), help="for what failed (%(default)s)")
    parser.add_argument("--loops", type=int, default=os.cpu_count() or 1, help="busy loops (default: one a core)")
    options, arguments = parser.parse_known_args()
    options.output.mkdir(parents=True, exist_ok=True)
    loops = [multiprocessing.Process(target=burn, daemon=True) for _ in range(options.loops)]
    tallies: dict[str, Tally] = defaultdict(Tally)
    codes = []
    for loop in loops:
        loop.start()
    try:
        for number in range(1, options.times + 1):
            log = options.output / f"{number}.txt"
            codes.append(run_once(arguments, tallies, log))
            print(f"{number}/{options.times}: {f'failed, see {log}' if codes[-1] else 'passed'}", flush=True)
    finally:
        for loop in loops:
            loop.terminate()
    for name, tally in sorted(tallies.items()):
        print(f"{tally.passed:3} passed {tally.failed:3} failed {tally.longest_s:7.1f} s  {name}")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
