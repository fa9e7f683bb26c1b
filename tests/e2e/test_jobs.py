"""`ray job submit` against a cluster with a dashboard."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from tests.s3 import KEYS, S3, serving
from tests.sockets import free_port


class Cluster(NamedTuple):
    address: str
    """Of the dashboard."""
    directory: Path
    """Where it keeps its files."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3]:
    with serving() as s3:
        yield s3


@pytest.fixture(scope="module")
def cluster(start_head: Any, bucket: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two CPUs and a dashboard, and keys of the bucket.

    The agent that takes the jobs has a fixed port unless told: another may use it.
    """
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**KEYS, "RAYRLHF_CACHE": str(tmp_path_factory.mktemp("node"))}.items():
            environment.setenv(name, value)
        head = start_head(f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0")
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 600
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
            break
        except (ConnectionError, RuntimeError):
            assert head.process.poll() is None and time.monotonic() < deadline, "no cluster that takes jobs"
            time.sleep(0.5)
    yield Cluster(address, head.ray_directory)
    head.end()


# A cluster with a dashboard, and a job in it.
@pytest.mark.long
def test_a_stage_as_a_job_in_a_bucket(
    cluster: Cluster, bucket: S3, finished: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cluster and submitter share nothing but the bucket."""
    for name, value in {**KEYS, "RAYRLHF_CACHE": str(tmp_path / "here")}.items():
        monkeypatch.setenv(name, value)
    run = RunFolder(bucket.uri("runs/quick"))
    shutil.copytree(finished.path / "sft", run.sft)
    run.upload(run.sft)
    arguments = ["python", "-m", "jobs.collect", "--config", *finished.arguments, f"runs_dir={bucket.uri('runs')}"]
    command = start("ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *arguments)
    outcome = command.wait()
    assert outcome.code == 0, outcome.out + outcome.err
    (uploaded,) = cluster.directory.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    names = {path.name for path in uploaded.iterdir()}
    assert {"jobs", "actors", "rayrlhf", "configs"} <= names and not names & {".git", ".venv", "runs", "tests"}
    assert sum(path.stat().st_size for path in uploaded.rglob("*")) < 30e6, "see .rayignore"
    assert "collect: done in" in outcome.out
    objects = bucket.objects("runs/quick/")
    assert {"config.yaml", "metrics.jsonl"} <= objects.keys() and objects[".lock"] == b"", "the lease is given back"
    # The same prompts and seeds: another process, whose files are elsewhere, collects the same comparisons.
    here = pq.read_table(io.BytesIO(objects["comparisons.parquet"])).to_pylist()
    assert here == pq.read_table(finished.path / "comparisons.parquet").to_pylist()


# A job that only starts; unit/test_storage has the refusal itself.
@pytest.mark.long
def test_a_job_refuses_a_relative_run_folder(cluster: Cluster, start: Any) -> None:
    """Its working directory is a temporary copy, where the results would be lost."""
    arguments = ["python", "-m", "jobs.pipeline", "--config", "configs/quickstart.yaml"]
    name = "relative"
    options = ["--address", cluster.address, "--submission-id", name, "--working-dir", "."]
    outcome = start("ray", "job", "submit", *options, "--", *arguments).wait()
    assert outcome.code != 0
    (error,) = {line for line in outcome.out.splitlines() if line.startswith("error: ")}
    assert "runs_dir=runs is relative" in error and "submit with runs_dir=/abs/path" in error
    assert JobSubmissionClient(cluster.address).get_job_status(name) == JobStatus.FAILED


# Two more starts of PPO for what e2e/test_interrupt shows of SIGTERM, which is what `ray job stop` sends.
@pytest.mark.long
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on(
    cluster: Cluster, finished: Any, before_rl: Path, start: Any
) -> None:
    steps = 40
    changes = [f"runs_dir={before_rl.parent}", f"rl.steps={steps}", "rl.checkpoint_every=100"]
    arguments = ["submit", "rl", *finished.arguments, *changes, "--address", cluster.address]
    followed = start("rayrlhf", *arguments)
    followed.wait_for_line(rf"rl +2/{steps} ")
    client = JobSubmissionClient(cluster.address)
    (job,) = (job for job in client.list_jobs() if (job.metadata or {}).get("stage") == "rl")
    assert job.metadata and job.metadata["run"] == "quick" and job.metadata["git_revision"] != "unknown"
    assert job.submission_id and client.stop_job(job.submission_id)
    outcome = followed.wait()
    assert outcome.code == 1 and f"job {job.submission_id} stopped" in outcome.err
    assert "stopping: rl writes a checkpoint when its step ends" in outcome.out
    done = len(read_metrics(before_rl, "rl"))
    assert 2 <= done < steps and not (before_rl / "policy").exists()
    assert list((before_rl / "checkpoints").glob("rl-*/checkpoint_*")), "nobody asked for one but the stop"

    second = start("rayrlhf", *arguments).wait()
    assert second.code == 0, second.out[-2000:] + second.err
    printed = [int(number) for number in re.findall(rf"^rl +(\d+)/{steps} ", second.out, re.MULTILINE)]
    assert printed == list(range(done + 1, steps + 1)), "from the checkpoint on"
    assert [line["step"] for line in read_metrics(before_rl, "rl")] == list(range(1, steps + 1))
