"""What Tune tells of trials that end at once, well or badly: lines, errors, order, results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.sweep import Board, draw, run_trials
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.sweeps.plan import load_sweep

MEASURE = {"low": 0.0, "high": 1.0, "n": 5}


# Tune starts a process for each trial; unit/test_sweep holds what is made of them.
@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_tune_runs_the_trials_and_one_that_fails_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("name: run")
    search = {"evaluate.max_prompts": {"grid": [1, 2, 3]}}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"config": "run.yaml", "name": "search", "search": search}))
    folder, sweep = tmp_path / "search", load_sweep(file)
    trials = sweep.trials(draw(sweep.search, 1, 0), folder)
    runs = {trial.name: open_or_create(trial.config, folder) for trial in trials}
    for run, gold in zip(runs.values(), (0.1, None, 0.3), strict=True):
        if gold is not None:  # these two are finished, as the pipeline in the trial will say
            record = {"sft": {}, "policy": {"gold": MEASURE | {"mean": gold}}, "differences": {"policy_minus_sft": {}}}
            record["metadata"] = {"data": "posts", "prompts": 5}
            run.evaluation.write_text(json.dumps(record))
            run.report.touch()
    board = Board(sweep, trials, runs, RunFolder(folder))
    with runs["max_prompts-2"].lock():  # the trial cannot have its folder
        run_trials(trials, 1, board)

    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("trial ")]
    assert len(lines) == 6 and lines == out.splitlines(), out  # and nothing else
    assert lines[0] == f"trial 1/3 max_prompts-1: started, see {runs['max_prompts-1'].path}/log.txt"
    assert lines[1].startswith("trial 1/3 max_prompts-1: policy.gold 0.100 [0.000, 1.000], took ")
    busy = f"failed: UserError: {folder}/max_prompts-2 is being written by process "
    assert lines[3].startswith(f"trial 2/3 max_prompts-2: {busy}")
    assert lines[5].startswith("trial 3/3 max_prompts-3: policy.gold 0.300") and lines[5].endswith("ETA 0 s")
    assert "run 'max_prompts-1' is finished" in (runs["max_prompts-1"].path / "log.txt").read_text()
    assert "is being written by" in (runs["max_prompts-2"].path / "log.txt").read_text()
    assert [result.trial.name for result in board.results()] == ["max_prompts-3", "max_prompts-1", "max_prompts-2"]
    assert "failed: UserError" in (folder / "sweep.md").read_text()
