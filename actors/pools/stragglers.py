"""Which worker of a pool is much slower than the others: each is reported once, by name, and goes on.

Others may do its work as well, see `actors.rollouts.in_turn.draw`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from actors.pools.worker import Worker

FACTOR = 10.0
"""A straggler is so many times slower than the median of the others."""
EVIDENCE_S = 30.0
"""Seconds of work before anybody is called slow: first calls take longer than others."""
_WINDOW_S = 600.0
"""Seconds of work over which a pace is measured: a worker may become slow after hours."""


@dataclass
class _Since:
    """Where the window of a worker begins."""

    busy_s: float = 0.0
    done: int = 0


class Stragglers:
    """Of one pool."""

    def __init__(self) -> None:
        self._since: dict[Worker, _Since] = {}
        self._reported: set[Worker] = set()
        self.slow: set[Worker] = set()
        """The stragglers of the last look."""

    def look(self, workers: Sequence[Worker], now: float) -> list[str]:
        """One line for each straggler that was not reported yet. `now` is `time.monotonic()`."""
        self._since = {worker: self._since.get(worker, _Since()) for worker in workers}
        self._reported &= {*workers}
        self.slow, found = set(), []
        for worker in workers:
            busy_s, done = self._work(worker, now)
            paces = [n / s for s, n in (self._work(w, now) for w in workers if w is not worker) if n and s]
            if busy_s < EVIDENCE_S or not paces:
                continue
            # The piece that it is at may be finished in a moment.
            if FACTOR * (done + 1) / busy_s >= (median := statistics.median(paces)):
                continue
            self.slow.add(worker)
            if worker not in self._reported:
                self._reported.add(worker)
                found.append(
                    f"{worker.name} is a straggler: {done} pieces of work in {busy_s:.0f} s, in which the median of "
                    f"the others does {median * busy_s:.0f}; it goes on, look whether its node is busy or throttled"
                )
        for worker, since in self._since.items():
            if self._work(worker, now)[0] > _WINDOW_S:
                since.busy_s, since.done = worker.busy_s, worker.done
        return found

    def _work(self, worker: Worker, now: float) -> tuple[float, int]:
        """Seconds of work and finished pieces in the worker's window, with the call under way."""
        under_way = now - worker.turn_began() if worker.calls else 0.0
        since = self._since[worker]
        return worker.busy_s - since.busy_s + under_way, worker.done - since.done
