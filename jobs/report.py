"""`rayrlhf report RUN`: writes the page of a run anew, or serves it while the run goes on (`--watch`). Needs no Ray."""

from __future__ import annotations

import hashlib
import os
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from jobs.console import console
from jobs.listening import listen
from rayrlhf.errors import UserError
from rayrlhf.reports.page import report, write_report
from rayrlhf.runs.folder import RunFolder, run_at
from rayrlhf.runs.metrics import read_lines, read_metrics
from rayrlhf.runs.rounds import has_rounds
from rayrlhf.terminal import say
from rayrlhf.wording import in_a_line

HOST = "127.0.0.1"
"""The page has prompts and answers: whoever is to see it from elsewhere comes through a tunnel."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own policy cannot say that
}


def write(address: str) -> None:
    """Write report.html of a run.

    Raises:
        UserError: no run folder, one of a run in rounds, or one in a store.
    """
    run = _run(address)
    if run.store:
        raise UserError(
            f"report: {run.address} is in a store, and the run writes its report there; look at it with --watch"
        )
    console.print(f"report: {write_report(run)}")


def watch(address: str, port: int) -> None:
    """Serve the page of a run on loopback until Ctrl-C; it follows the run.

    Raises:
        UserError: no run folder, one of a run in rounds, or the port is taken.
    """
    run = _run(address)
    with listen(HOST, port, "report") as listening:
        say(f"report: http://{HOST}:{listening.getsockname()[1]}/ follows {run.address}; Ctrl-C ends it")
        server = uvicorn.Server(
            uvicorn.Config(application(run), log_level="warning", server_header=False, timeout_graceful_shutdown=2)
        )
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
    console.print("report: closed")


def application(run: RunFolder) -> Starlette:
    """The page, and a word that changes when there is news."""
    pages = _Pages(run)
    # Only the machine's own names: another site's name that leads here is a way round the browser's rules.
    own = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(
        routes=[Route("/", pages.page), Route("/state", pages.state)],
        middleware=[own],
        exception_handlers={UserError: pages.fail},
    )


class _Pages:
    """The answers to requests. Starlette runs them in threads."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._lock = threading.Lock()
        """A page takes a second: several readers wait for one."""
        self._made: tuple[str, str] = ("", "")
        """The state, and its page."""

    def page(self, request: Request) -> Response:
        with self._lock:
            now = state(self.run)
            if now != self._made[0]:
                self._made = now, report(self.run, read_metrics(self.run.address), live=now)
            return HTMLResponse(self._made[1], headers=HEADERS)

    def state(self, request: Request) -> Response:
        return PlainTextResponse(state(self.run), headers=HEADERS)

    def fail(self, request: Request, error: Exception) -> Response:
        """What a reader gets of a run without a config that can be read; the next look may find another one."""
        return PlainTextResponse(in_a_line(str(error)), 503, HEADERS)


def state(run: RunFolder) -> str:
    """A hash that changes when the run has written something that the page shows."""
    seen = hashlib.blake2b(digest_size=16)
    seen.update(read_lines(run.address))
    if run.store:
        files = [run.evaluation, run.samples, run.reward_accuracy]
        seen.update(repr([run.store.exists(file) for file in files]).encode())
    else:
        watched = [file for end in ("json", "jsonl", "parquet", "yaml") for file in run.path.glob(f"*.{end}")]
        stats = {file.name: (os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in sorted(watched)}
        looks = sorted(file.name for file in run.dev_samples.glob("*.jsonl"))
        seen.update(repr((stats, looks)).encode())
    return seen.hexdigest()


def _run(address: str) -> RunFolder:
    run = run_at(address)
    if has_rounds(run):
        raise UserError(f"report: {run.address} is a run in rounds; name one of them, such as {run.address}/round-1")
    if run.read(run.config) is None:
        raise UserError(f"{run.address}: no run folder (it has no config.yaml); `rayrlhf runs DIR` lists those in DIR")
    return run
