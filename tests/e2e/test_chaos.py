"""A run that meets faults ends as if nothing had happened; `make chaos` has a hundred faults."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checks import check
from tests.chaos.faults import Fault
from tests.chaos.runs import Run


def test_a_run_that_meets_faults_in_its_last_two_stages_ends_to_the_bit(finished: Any, tmp_path: Path) -> None:
    """At moment 0 a role is struck as soon as it lives, which no machine is too fast or too slow for."""
    run = Run(finished.copy_before_rl(tmp_path / "runs").parent, finished.path.name, [])
    undisturbed = Run(finished.path.parent, finished.path.name, [])
    faults = [Fault("rl", "kill", "learner"), Fault("evaluate", "kill", "driver")]
    met = run.to_the_end(faults, random.Random(0), undisturbed.stage_seconds())
    assert [each["fault"] for each in met] == ["kill learner in rl at 0%", "kill driver in evaluate at 0%"]
    assert met[1]["ended"].startswith("-9:")
    assert all(each["recovered_s"] is not None for each in met)
    assert check(run, undisturbed, exact=True) == []


# Two whole runs, one of which is started again several times.
@pytest.mark.long
def test_a_run_that_meets_five_faults_ends_to_the_bit(start: Any, tmp_path: Path) -> None:
    outcome = start("python", "-m", "tests.chaos", "--faults", "5", "--directory", str(tmp_path)).wait()
    assert outcome.code == 0, f"{outcome.out[-3000:]}\n{outcome.err[-3000:]}"
    met = [json.loads(line) for line in (tmp_path / "chaos.jsonl").read_text().splitlines()]
    assert len(met) >= 5 and len({each["stage"] for each in met}) >= 4
    assert all(each["recovered_s"] is not None for each in met)
