"""Showing a stage while its loop runs in Ray Train's workers: the driver reads metrics.jsonl as it grows.

So the terminal, a job's log and the file say the same, whichever node the worker is on, and a worker's other output
stays in the dashboard.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jobs.console import warn
from rayrlhf.reports.progress import Progress, has_step_line, sample_panel, step_line
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import WARNINGS, read_lines, read_metrics

POLL_S, STORE_POLL_S = 0.25, 2.0

log = logging.getLogger(__name__)


@contextmanager
def following(run: RunFolder, stage: str, console: Console) -> Iterator[None]:
    """Print a line for each step of `stage` written during the block; on a terminal a bar, too."""
    offset = len(read_lines(run.address))
    earlier = read_metrics(run.address, stage)  # of an attempt that this one continues
    total = next((int(n) for line in earlier if (n := line.get(f"{stage}/steps")) is not None), None)
    progress: Progress | None = None
    stop = threading.Event()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

    def show_evaluation(metrics: dict[str, Any]) -> None:
        if "answers" in metrics:
            console.print(f"{stage} step {metrics['step']}, answers to dev prompts:")
            console.print(metrics["answers"], soft_wrap=True, highlight=False)
        else:
            console.print(step_line(metrics["stage"], metrics["step"], None, metrics), soft_wrap=True)

    def show_step(metrics: dict[str, Any]) -> None:
        nonlocal progress, total
        if f"{stage}/steps" in metrics:
            total = int(metrics[f"{stage}/steps"])
            bar.update(task, total=total)
        if "note" in metrics:
            console.print(f"{stage}: {metrics['note']}", soft_wrap=True)
            return
        if "sample" in metrics:
            console.print(sample_panel(**metrics["sample"], title=f"{stage} step {metrics['step']}, first dev prompt"))
            return
        if not has_step_line(stage, metrics):
            return
        done = metrics["step"]
        if progress is None:
            assert total is not None, "a loop says how many steps it has before, or with, the first one"
            progress = Progress(stage, total, done=done, console=console)  # the pace counts from the first line
        progress.update(done, metrics)
        bar.update(task, completed=done)

    def show(line: bytes) -> None:
        try:
            metrics = json.loads(line)
        except ValueError:
            return  # the last line of a writer that was killed
        if metrics.get("stage") == f"{stage}_eval":
            show_evaluation(metrics)
        if metrics.get("stage") == stage:
            show_step(metrics)
            for warning in metrics.get(WARNINGS, ()):
                warn(console, f"{stage} step {metrics['step']}: {warning}")

    def read() -> None:
        nonlocal offset
        lines = read_lines(run.address, offset)
        offset += len(lines)
        for line in lines.splitlines():
            if line.strip():
                show(line)

    def poll() -> None:
        while not stop.wait(STORE_POLL_S if run.store else POLL_S):
            try:
                read()
            except OSError as error:  # a store may be out of reach for a while; the stage decides what that means
                log.warning("%s: %s", run.address, error)

    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(stage, total=total)
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            read()
