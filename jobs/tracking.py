"""Feeds the trackers of a run from its metrics.jsonl, in a thread of the driver.

The loops write one file, on whatever node they are; here it is read as it grows, so no other process needs a tracker's
package or its keys. `tracking.json` of the run folder says what each tracker calls the run and how far it has read:

    {"wandb": {"known": "k3x9f0aa", "read": 18234, "outcome": null}}

So the same command goes on with the same run. A tracker that fails is left out, with one warning; the run goes on, and
the next session hands over what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from jobs.console import console, warn
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config
from rayrlhf.errors import one_line
from rayrlhf.files import replacing
from rayrlhf.reports.results import read_evaluation
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_lines
from rayrlhf.runs.reading import read_json, read_rows, sound
from rayrlhf.runs.rounds import has_rounds
from rayrlhf.tracking.base import Outcome, Tracked, Tracker
from rayrlhf.tracking.registry import make_tracker

log = logging.getLogger(__name__)

RECORD = "tracking.json"
_POLL_S, _STORE_POLL_S = 1.0, 5.0
_END_S = 120.0
"""How long the end of a session waits for trackers, whose servers may be slow."""


@dataclass
class _State:
    """What tracking.json says of one tracker."""

    known: str | None = None
    read: int = 0
    """Bytes of metrics.jsonl that it has taken."""
    outcome: str | None = None
    """Hash of the evaluation that it has taken."""


class Tracking:
    """The trackers of one run during one session, as a context: it begins with `start` and ends with `close`."""

    def __init__(self, config: Config, run: RunFolder) -> None:
        self._run = run
        above = RunFolder(config.runs_dir)
        name = f"{above.name}/{config.name}" if has_rounds(above) else config.name
        self._tracked = Tracked(name, run.address, run.path, dump_config(config))
        self._record = run.path / RECORD
        address = run.address_of(self._record)
        with sound(address):
            self._kept: dict[str, Any] = read_json(run.read(self._record) or b"{}", address, dict[str, _State])
            self._states: dict[str, _State] = {name: _State(**self._kept.get(name, {})) for name in config.tracking}
        self._open: dict[str, Tracker] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin in a thread: a tracker's server may take its time."""
        if self._states:
            self._thread.start()

    def close(self) -> None:
        """Hand over the rest, and what an evaluation has found."""
        self._ended.set()
        if self._states:
            self._thread.join(_END_S)
            if self._thread.is_alive():
                warn(console, f"tracking: {', '.join(self._open)} took more than {_END_S:.0f} s; the rest is handed "
                     "over by the next command on this run")  # fmt: skip

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _follow(self) -> None:
        for name in self._states:
            tracker = make_tracker(name)
            with self._trying(name):
                self._states[name].known = tracker.open(self._tracked, self._states[name].known)
                self._open[name] = tracker
        self._keep()
        pause = _STORE_POLL_S if self._run.store else _POLL_S
        while not self._ended.wait(pause):
            self._hand_over()
        self._hand_over()
        for name, tracker in list(self._open.items()):
            with self._trying(name):
                self._finish(name, tracker)
                tracker.close()
        self._keep()

    def _hand_over(self) -> None:
        """Give each tracker the lines that it has not had."""
        for name, tracker in list(self._open.items()):
            state = self._states[name]
            try:
                lines = read_lines(self._run.address, state.read)
            except OSError as error:  # a store may be out of reach for a while
                log.warning("%s: %s", self._run.address, error)
                return
            with self._trying(name):
                for line in lines.splitlines(keepends=True):
                    if (parsed := _parsed(line)) is not None:
                        tracker.write(parsed)
                    state.read += len(line)
            if lines:
                self._keep()

    def _finish(self, name: str, tracker: Tracker) -> None:
        content = self._run.read(self._run.evaluation)
        if content is None:
            return
        seen = hashlib.blake2b(content, digest_size=8).hexdigest()
        if self._states[name].outcome != seen:
            tracker.finish(outcome_of(self._run, read_evaluation(self._run) or {}))
            self._states[name].outcome = seen

    def _keep(self) -> None:
        kept = self._kept | {name: asdict(state) for name, state in self._states.items() if state != _State()}
        if kept == self._kept:  # a run that ended before its first line has nothing to keep
            return
        self._kept = kept
        with replacing(self._record) as temporary:
            temporary.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        with contextlib.suppress(OSError):
            self._run.upload(self._record)

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """What goes wrong in the block ends the tracker and not the run."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            warn(console, f"tracking: {name} is left out from here on: {type(error).__name__}: {one_line(error)[:300]}")


def outcome_of(run: RunFolder, evaluation: dict[str, Any]) -> Outcome:
    """What the run's evaluation has found."""
    measures = {
        f"evaluation/{source}/{measure}": value["mean"]
        for source, found in evaluation.items()
        if source not in ("differences", "metadata")
        for measure, value in found.items()
        if isinstance(value, dict) and "mean" in value
    }
    content = run.read(run.samples)
    rows = [] if content is None else read_rows(content, run.address_of(run.samples))
    report = run.download(run.report) if run.read(run.report) is not None else None
    return Outcome(measures, rows, report)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None  # the last line of a writer that was killed
    return found if isinstance(found, dict) and "stage" in found else None
