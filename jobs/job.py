"""What `rayrlhf submit` hands in: the command of a job, its environment, and what the dashboard says about it.

Mistakes in the config show here, before Ray is imported and anything is uploaded.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.runs.addresses import runs_address
from rayrlhf.runs.stages import STAGES
from rayrlhf.sweeps.plan import load_sweep

MODULES = {"run": "pipeline", **{stage.command: stage.name for stage in STAGES.values()}, "sweep": "sweep"}
"""What can be submitted: the sub-command, and the module of `jobs` that does it."""
GRACE_S = 60
"""Seconds from the signal that stops a job until Ray kills it: `rl` ends its step and writes a checkpoint in them."""


@dataclass(frozen=True)
class Job:
    """The arguments of Ray's `submit_job`."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def describe(
    stage: str, config: Path, overrides: list[str], directory: Path, environment: dict[str, str], python: str
) -> Job:
    """The job that runs `stage`.

    Args:
        stage: a key of `MODULES`.
        config: a file inside `directory`.
        overrides: changes to the config, `key.sub=value`.
        directory: is uploaded, without the files that its .rayignore names.
        environment: further variables of the job and its actors.
        python: how Python is called on the cluster: `python` of the node's environment, or `uv run` with the
            project's lock file.

    Raises:
        UserError: no such stage, a mistake in the config, or a `runs_dir` that a job cannot use.
    """
    if stage not in MODULES:
        raise UserError(f"submit: {stage!r} is no stage; known: {', '.join(MODULES)}")
    directory = directory.resolve()
    try:
        file = config.resolve().relative_to(directory)
    except ValueError:
        raise UserError(
            f"{config}: not inside {directory}, the directory that is uploaded; use --working-dir"
        ) from None
    base = load_sweep(config, overrides).base if stage == "sweep" else load_config(config, overrides)
    runs_address(base.runs_dir, inside_job=True)
    arguments = shlex.join(["-m", f"jobs.{MODULES[stage]}", "--config", str(file), *overrides])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **environment}
    runtime_env: dict[str, Any] = {"working_dir": str(directory), "env_vars": variables}
    if python.startswith("uv "):
        runtime_env["py_executable"] = python  # the actors' Python, too
    metadata = {"run": base.name, "stage": stage, "git_revision": _revision(directory)}
    return Job(f"{python} {arguments}", runtime_env, metadata)


def _revision(directory: Path) -> str:
    """The commit that is checked out, with -dirty if files differ; "unknown" outside git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
