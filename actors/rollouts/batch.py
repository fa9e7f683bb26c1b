"""What a step's rollouts are for the learner: trajectories, and the metrics of making them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import cached_property

from actors.pools.remote import ActorFailure
from actors.rollouts.ahead import Cursor
from rayrlhf.trajectory import SerializedTrajectory, Trajectory


@dataclass(frozen=True)
class Batch:
    """A step's scored trajectories and what making them took."""

    step: int
    version: int
    serialized: list[SerializedTrajectory]
    cursor: Cursor
    """Which prompts are left after it."""
    metrics: dict[str, float]

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """Loaded where they are first asked for: by the learner."""
        return [serialized.load() for serialized in self.serialized]

    @classmethod
    def of(
        cls, step: int, version: int, serialized: list[SerializedTrajectory], cursor: Cursor, max_staleness: int
    ) -> Batch:
        """A batch with the metrics of its trajectories.

        Raises:
            ActorFailure: tokens are older than that, or newer than the learner.
        """
        oldest, newest = version - min(t.oldest for t in serialized), version - max(t.newest for t in serialized)
        if oldest > max_staleness or newest < 0:
            raise ActorFailure(
                f"step {step}: tokens are {newest} to {oldest} versions behind the learner's {version}, allowed are "
                f"0 to {max_staleness}"
            )
        tokens = sum(t.response_tokens for t in serialized)
        metrics = {
            "rollout/staleness/mean": version - sum(t.version_sum for t in serialized) / tokens,
            "rollout/staleness/max": float(oldest),
        }
        gold = [t.gold for t in serialized if t.gold is not None]
        if gold:
            metrics |= {"ppo/gold/mean": statistics.fmean(gold), "ppo/gold/std": statistics.pstdev(gold)}
        return cls(step, version, serialized, cursor, metrics)


@dataclass(frozen=True)
class Counts:
    """What had happened up to a batch: the next one's metrics are of what came since."""

    time: float = 0.0
    deaths: int = 0
    busy_s: dict[str, float] = field(default_factory=dict)
    """By name."""

    def since(self, before: Counts) -> dict[str, float]:
        seconds = self.time - before.time
        idle = {
            f"idle/{name}": min(1.0, max(0.0, 1.0 - (busy - before.busy_s.get(name, 0.0)) / seconds))
            for name, busy in self.busy_s.items()
        }
        # Also of those that died while weights were loaded.
        return idle | {"rollout/replacements": float(self.deaths - before.deaths)}
