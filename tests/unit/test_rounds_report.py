"""The tables and the curves over the rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.rounds import run_rounds
from rayrlhf.reports.round_measures import RoundResult, read_rounds
from rayrlhf.reports.rounds import accuracy_rows, rounds_figure, rows
from rayrlhf.runs.folder import RunFolder
from tests.rounds import Killed, config, stages_that


def test_the_tables_and_the_figure(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(Killed):
        run_rounds(config(runs_dir=str(tmp_path)), stages_that(log, [0.7, 0.6], kill="round-3 rl"))
    found = read_rounds(RunFolder(tmp_path / "mine"))
    table = rows(found)
    assert table[0] == ["round", "gold", "reward", "KL to SFT", "length", "wins over the round before", "wins over SFT"]
    assert table[1][1:3] == ["0.210 [0.190, 0.230]", "1.000 [0.980, 1.020]"]
    assert [row[5] for row in table[1:]] == ["0.700 [0.680, 0.720]", "0.600 [0.580, 0.620]", "–"]
    assert table[2][6] == "0.700 [0.680, 0.720]"
    accuracy = accuracy_rows(found)
    assert accuracy[0][1:] == [f"comparisons of round {n}" for n in (1, 2, 3)]
    assert [[cell == "–" for cell in row[1:]] for row in accuracy[1:]] == [
        [False, True, True], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert accuracy[1][1] == "1.000 [1.000, 1.000], confident 0.731"
    figure = rounds_figure(found)
    assert figure is not None
    drawn = {axes.get_title(loc="left"): axes for axes in figure.axes}
    gold = drawn["Gold; round 0 is SFT"].containers[0].lines[0]  # type: ignore[attr-defined]
    assert list(gold.get_xdata()) == [0, 1, 2] and list(gold.get_ydata()) == pytest.approx([0.2, 0.21, 0.22])
    assert len(drawn["Win rates"].containers) == 2 and "KL to the SFT model" in drawn
    assert rounds_figure([RoundResult(1, None, {})]) is None
    page = (tmp_path / "mine/report.html").read_text()
    assert "data:image/svg+xml" in page and "<h2>Reward models</h2>" in page
