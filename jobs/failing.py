"""An error that ends a run is written into the run's log, before the command tells it in one line (`jobs.guard`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray

from rayrlhf.errors import UserError
from rayrlhf.failures import log_of, told
from rayrlhf.runs.error_log import RAY, record
from rayrlhf.runs.folder import RunFolder


@contextlib.contextmanager
def recorded(run: RunFolder) -> Iterator[None]:
    """In the block, whatever is raised and no user's mistake goes into the run's `errors.log`, once, and is raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if log_of(error) is None:
            with contextlib.suppress(OSError, UserError):  # a full disk or a store away may be what it is about
                record(run, error, told(error), _ray_logs())
        raise


def _ray_logs() -> str:
    """Where Ray has the logs of this run's processes, for `rayrlhf doctor`."""
    if not ray.is_initialized():
        return ""
    node = ray._private.worker._global_node
    session = node.get_session_dir_path() if node is not None else "unknown"
    return f"{RAY}{session}, job {ray.get_runtime_context().get_job_id()}"
