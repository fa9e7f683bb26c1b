"""`rayrlhf submit`: hand in a stage, or all of them, as a Ray job; follow its log and exit as the job does."""

from __future__ import annotations

import asyncio
import time

from aiohttp import ClientError
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from actors.pools.remote import ActorFailure
from jobs.job import Job
from rayrlhf.errors import UserError
from rayrlhf.terminal import say

_END_S = 300
"""Seconds from the end of a job's log until its status must say that it ended."""


def submit(job: Job, address: str, follow: bool) -> None:
    """Hand the job in and, if `follow`, print its log until it ends. Ctrl-C leaves it running.

    Args:
        job: from `jobs.job.describe`.
        address: of the cluster's dashboard, such as `http://127.0.0.1:8265`.
        follow: whether to wait for the job's end.

    Raises:
        UserError: no cluster at the address, or the job ended because of a user's mistake (its log has the line).
        ActorFailure: the job failed or was stopped, or its log cannot be followed any more.
        SystemExit: with code 130, if Ctrl-C came before the job ended.
    """
    try:
        client = JobSubmissionClient(address)
        name = client.submit_job(entrypoint=job.entrypoint, runtime_env=job.runtime_env, metadata=job.metadata)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:  # RayError: the cluster wants a token
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"submit: {address} does not take jobs ({reason}); start a cluster (docs/cluster.md), give its dashboard "
            "as --address, and set RAY_AUTH_MODE as the cluster does"
        ) from error
    look = f"ray job logs --follow --address {address} {name}"
    say(f"submitted {name} ({job.metadata['run']}, revision {job.metadata['git_revision']}) to {address}")
    if not follow:
        say(f"follow it with: {look}")
        return
    try:
        asyncio.run(_print_log(client, name))
        details = _ended(client, name)
    except KeyboardInterrupt:
        say(f"\nleft; {name} goes on. To stop it: ray job stop --address {address} {name}")
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
        say(lines.replace("\r", "\n"), end="")  # bars of progress write over their line


def _ended(client: JobSubmissionClient, name: str) -> JobDetails:
    deadline = time.monotonic() + _END_S
    while not client.get_job_status(name).is_terminal():
        if time.monotonic() > deadline:
            raise ActorFailure(f"job {name}: its log ended and it has not; look at the dashboard")
        time.sleep(0.5)
    return client.get_job_info(name)
