"""`ray job submit` against a cluster with a dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of a two-CPU cluster's dashboard. Jobs find `python` on the PATH that the cluster was started with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert not 10002 <= port <= 19999, "that is where Ray's workers listen"
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{path}"
    ray.init(
        address="local", num_cpus=2, include_dashboard=True, dashboard_port=port, _temp_dir=directory,
        log_to_driver=False,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        os.environ["PATH"] = path
        shutil.rmtree(directory, ignore_errors=True)


def test_a_stage_as_a_job(dashboard: str, finished: Any, start: Any, tmp_path: Path) -> None:
    run = tmp_path / "quick"
    shutil.copytree(finished.path, run, ignore=shutil.ignore_patterns("evaluation.json", "samples.parquet"))
    arguments = ["python", "-m", "jobs.evaluate", "--config", *finished.arguments, f"runs_dir={tmp_path}"]
    command = start("ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *arguments)
    outcome = command.wait(400)
    text = outcome.out + outcome.err
    assert outcome.code == 0, text
    uploaded = re.search(r"Pushing file package .* \(([\d.]+)(KiB|MiB|GiB)\)", text)
    assert uploaded is not None, text
    assert uploaded[2] != "GiB" and float(uploaded[1]) < 30, "the upload holds what .rayignore should leave behind"
    assert "finished" not in outcome.out and "evaluate: done in" in outcome.out
    here, before = (json.loads((path / "evaluation.json").read_text()) for path in (run, finished.path))
    # Near-greedy answers with the same seeds: another process gives the same evaluation.
    assert here["metadata"] == before["metadata"]
    for source in ("sft", "policy"):
        for name in ("reward", "rougeL", "length"):
            assert here[source][name]["mean"] == pytest.approx(before[source][name]["mean"], abs=1e-3)


def test_a_job_refuses_a_relative_run_folder(dashboard: str, start: Any) -> None:
    """Its working directory is a temporary copy, where the results would be lost."""
    arguments = ["python", "-m", "jobs.pipeline", "--config", "configs/quickstart.yaml"]
    name = "relative"
    submit = ["job", "submit", "--address", dashboard, "--submission-id", name, "--working-dir", ".", "--", *arguments]
    outcome = start("ray", *submit).wait(300)
    assert outcome.code != 0
    errors = [line for line in outcome.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.out
    assert "runs_dir=runs is relative" in errors[0] and "submit with runs_dir=/abs/path" in errors[0]
    assert JobSubmissionClient(dashboard).get_job_status(name) == JobStatus.FAILED
