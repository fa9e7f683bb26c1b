"""What `rayrlhf submit` hands in, and that mistakes show before anything is uploaded."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import jobs.submit
from actors.pools.remote import ActorFailure
from jobs.job import MODULES, Job, describe
from jobs.submit import submit
from rayrlhf.errors import UserError

ROOT = Path(__file__).parents[2]


def describe_here(directory: Path, stage: str = "rl", overrides: tuple[str, ...] = (), **changes: Any) -> Job:
    config = directory / "my configs" / "mine.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text("name: mine\nruns_dir: /abs/runs\n")
    arguments: dict[str, Any] = {"directory": directory, "environment": {}, "python": "python"} | changes
    return describe(stage, arguments.pop("config", config), list(overrides), **arguments)


def test_a_job_says_what_it_runs(tmp_path: Path) -> None:
    job = describe_here(
        tmp_path, overrides=("rl.steps=3", "name=its", "model.path=it's here"), environment={"HF_TOKEN": "x"}
    )
    assert shlex.split(job.entrypoint) == [
        "python", "-m", "jobs.rl", "--config", "my configs/mine.yaml", "rl.steps=3", "name=its",
        "model.path=it's here",
    ]  # fmt: skip
    assert job.metadata == {"run": "its", "stage": "rl", "git_revision": "unknown"}
    assert job.runtime_env == {
        "working_dir": str(tmp_path), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "HF_TOKEN": "x"}
    }  # fmt: skip


def test_uv_runs_the_job_and_its_actors(tmp_path: Path) -> None:
    job = describe_here(tmp_path, python="uv run --extra cpu python")
    assert job.entrypoint.startswith("uv run --extra cpu python -m jobs.rl ")
    assert job.runtime_env["py_executable"] == "uv run --extra cpu python"


def test_a_run_and_a_sweep_may_be_in_a_store(tmp_path: Path) -> None:
    uri = "runs_dir=s3://bucket/runs?endpoint_override=http://127.0.0.1:9000"
    assert shlex.split(describe_here(tmp_path, overrides=(uri,)).entrypoint)[-1] == uri
    sweep = describe("sweep", ROOT / "configs/sweeps/quickstart_ppo.yaml", [uri], ROOT, {}, "python")
    assert shlex.split(sweep.entrypoint)[-1] == uri


def test_the_revision_is_gits(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    job = describe_here(tmp_path)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert job.metadata["git_revision"] == "unknown", "nothing was committed yet"
    assert describe_here(tmp_path).metadata["git_revision"] == head.strip()
    (tmp_path / "my configs" / "mine.yaml").write_text("name: mine\nruns_dir: /other\n")
    assert describe("sft", tmp_path / "my configs/mine.yaml", [], tmp_path, {}, "python").metadata["git_revision"] == (
        head.strip() + "-dirty"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "pppo"}, "submit: 'pppo' is no stage; known: run, sft, collect"),
        ({"overrides": ("runs_dir=runs",)}, "runs_dir=runs is relative"),
        ({"overrides": ("rl.stepz=1",)}, "stepz"),
        ({"overrides": ("runs_dir=s3://id:hush@b/runs",)}, "must hold no keys"),
        ({"config": ROOT / "configs/quickstart.yaml"}, "not inside .*--working-dir"),
    ],
)
def test_mistakes_show_first(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_here(tmp_path, **changes)


def test_every_stage_has_its_module() -> None:
    for module in MODULES.values():
        assert (ROOT / "jobs" / f"{module}.py").is_file()


def test_no_cluster_is_one_line() -> None:
    with pytest.raises(UserError, match=r"submit: http://127\.0\.0\.1:9 does not take jobs .*docs/cluster\.md"):
        submit(Job("true", {}, {"run": "x"}), "http://127.0.0.1:9", follow=True)


class Cluster:
    """Takes jobs, and then `raises` where its log is followed."""

    raises: BaseException

    def __init__(self, address: str) -> None:
        pass

    def submit_job(self, **job: Any) -> str:
        return "raysubmit_1"

    def tail_job_logs(self, name: str) -> Any:
        raise self.raises


def test_a_job_that_is_left_or_lost_goes_on_and_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs.submit, "JobSubmissionClient", Cluster)
    job = describe_here(tmp_path)
    monkeypatch.setattr(Cluster, "raises", KeyboardInterrupt(), raising=False)
    with pytest.raises(SystemExit) as left:
        submit(job, "http://head:8265", follow=True)
    assert left.value.code == 130
    assert (
        "raysubmit_1 goes on. To stop it: ray job stop --address http://head:8265 raysubmit_1"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(Cluster, "raises", RuntimeError("the tunnel is gone"))
    with pytest.raises(ActorFailure, match=r"lost the connection .*the tunnel is gone.*goes on: ray job logs --follow"):
        submit(job, "http://head:8265", follow=True)
