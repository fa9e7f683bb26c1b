"""`rayrlhf submit`: a stage, or all of them, as a Ray job, with its log followed and its outcome as the exit code."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from actors.pools.remote import ActorFailure
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.runs.folder import runs_address
from rayrlhf.runs.stages import STAGES
from rayrlhf.sweeps.plan import load_sweep

MODULES = {"run": "pipeline", **{stage.command: stage.name for stage in STAGES.values()}, "sweep": "sweep"}
"""What can be submitted: the sub-command, and the module of `jobs` that does it."""
GRACE_S = 60
"""How long a stopped job may take until it is killed: PPO ends its step with a checkpoint."""
_START_S = 300


@dataclass(frozen=True)
class Job:
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def describe(
    stage: str, config: Path, overrides: list[str], directory: Path, environment: dict[str, str], python: str
) -> Job:
    """What is submitted; mistakes in the config show here, before anything is uploaded.

    Args:
        config: a file inside `directory`, which is uploaded without what its .rayignore names.
        environment: further variables of the job and its actors.
        python: what runs Python there: `python` of the node's environment, or `uv run` with the project's lock file.
    """
    if stage not in MODULES:
        raise UserError(f"submit: {stage!r} is no stage; known: {', '.join(MODULES)}")
    directory = directory.resolve()
    try:
        file = config.resolve().relative_to(directory)
    except ValueError:
        raise UserError(f"{config}: not inside {directory}, which is what the job gets; use --working-dir") from None
    base = load_sweep(config, overrides).base if stage == "sweep" else load_config(config, overrides)
    runs_address(base.runs_dir, inside_job=True)
    arguments = shlex.join(["-m", f"jobs.{MODULES[stage]}", "--config", str(file), *overrides])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **environment}
    runtime_env: dict[str, Any] = {"working_dir": str(directory), "env_vars": variables}
    if python.startswith("uv "):
        runtime_env["py_executable"] = python  # the actors' Python, too
    metadata = {"run": base.name, "stage": stage, "git_revision": _revision(directory)}
    return Job(f"{python} {arguments}", runtime_env, metadata)


def submit(job: Job, address: str, follow: bool) -> None:
    """Hand the job in and, if `follow`, print its log until it ends. Ctrl-C leaves it running.

    Raises:
        UserError: no cluster at the address, or the job ended with a user's mistake (its log has the line).
        ActorFailure: the job failed or was stopped, or its log cannot be followed any more.
        SystemExit: interrupted, with 130: the job's end is not known.
    """
    try:
        client = JobSubmissionClient(address)
        name = client.submit_job(entrypoint=job.entrypoint, runtime_env=job.runtime_env, metadata=job.metadata)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:  # the last one: without the cluster's token
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"submit: {address} does not take jobs ({reason}); start a cluster (docs/cluster.md), give its dashboard "
            "as --address, and set RAY_AUTH_MODE as the cluster does"
        ) from error
    look = f"ray job logs --follow --address {address} {name}"
    print(f"submitted {name} ({job.metadata['run']}, revision {job.metadata['git_revision']}) to {address}", flush=True)
    if not follow:
        print(f"follow it with: {look}", flush=True)
        return
    try:
        asyncio.run(_print_log(client, name))
        details = _ended(client, name)
    except KeyboardInterrupt:
        print(f"\nleft; {name} goes on. To stop it: ray job stop --address {address} {name}", flush=True)
        raise SystemExit(130) from None
    except (ClientError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ActorFailure(f"lost the connection to {address} ({reason}); {name} goes on: {look}") from error
    if details.status != JobStatus.SUCCEEDED:
        if details.driver_exit_code == 2:
            raise UserError(f"job {name}: see the line above")
        raise ActorFailure(f"job {name} {details.status.lower()}: {details.message}")


async def _print_log(client: JobSubmissionClient, name: str) -> None:
    async for lines in client.tail_job_logs(name):
        print(lines, end="", flush=True)


def _ended(client: JobSubmissionClient, name: str) -> JobDetails:
    deadline = time.monotonic() + _START_S
    while not client.get_job_status(name).is_terminal():
        if time.monotonic() > deadline:
            raise ActorFailure(f"job {name}: its log ended and it has not; look at the dashboard")
        time.sleep(0.5)
    return client.get_job_info(name)


def _revision(directory: Path) -> str:
    """The commit that is checked out, with -dirty if files differ; "unknown" outside git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
