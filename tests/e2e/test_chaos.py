"""A run that meets a fault in each of its stages ends as if nothing had happened; `make chaos` has a hundred faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


# Two whole runs, one of which is started again several times.
@pytest.mark.long
def test_a_run_that_meets_five_faults_ends_to_the_bit(start: Any, tmp_path: Path) -> None:
    outcome = start("python", "-m", "tests.chaos", "--faults", "5", "--directory", str(tmp_path)).wait()
    assert outcome.code == 0, f"{outcome.out[-3000:]}\n{outcome.err[-3000:]}"
    met = [json.loads(line) for line in (tmp_path / "chaos.jsonl").read_text().splitlines()]
    assert len(met) >= 5 and len({each["stage"] for each in met}) >= 4
    assert all(each["recovered_s"] is not None for each in met)
