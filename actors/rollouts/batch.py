"""A batch for the learner: the scored trajectories of a step, and the metrics of making them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import cached_property

from actors.pools.remote import ActorFailure
from actors.rollouts.groups import Cursor
from rayrlhf.rewards.diversity import diversity
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
    redrawn: int = 0
    """Groups that taught nothing and whose places others took."""

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """The trajectories, deserialized at the first use: by the learner, since the coordinator reads none."""
        return [serialized.load() for serialized in self.serialized]

    @classmethod
    def of(
        cls,
        step: int,
        version: int,
        serialized: list[SerializedTrajectory],
        cursor: Cursor,
        max_staleness: int,
        redrawn: int = 0,
    ) -> Batch:
        """A batch with the metrics of its trajectories.

        Raises:
            ActorFailure: a token is more than `max_staleness` versions older than the learner's weights, or newer.
        """
        most_behind = version - min(t.oldest for t in serialized)
        least_behind = version - max(t.newest for t in serialized)
        if most_behind > max_staleness or least_behind < 0:
            raise ActorFailure(
                f"step {step}: tokens are {least_behind} to {most_behind} versions behind the learner's {version}, "
                f"allowed are 0 to {max_staleness}"
            )
        tokens = sum(t.written_tokens for t in serialized)
        metrics = {
            "rollout/staleness/mean": version - sum(t.version_sum for t in serialized) / tokens,
            "rollout/staleness/max": float(most_behind),
        }
        if any(t.turns > 1 for t in serialized):
            metrics["rollout/turns"] = statistics.fmean(t.turns for t in serialized)
        gold = [t.gold for t in serialized if t.gold is not None]
        if gold:
            metrics |= {"rl/gold/mean": statistics.fmean(gold), "rl/gold/std": statistics.pstdev(gold)}
        worded = [t.wording for t in serialized if t.wording is not None]
        if worded:
            metrics |= {f"rl/{name}": value for name, value in diversity(worded).items()}
        for name in dict.fromkeys(name for t in serialized for name in t.counted):
            metrics[f"rl/{name}"] = float(sum(t.counted.get(name, 0) for t in serialized))
        names = serialized[0].rewards
        for name in names if len(names) > 1 else ():  # one alone is the score
            of_name = [t.rewards[name] for t in serialized]
            metrics |= {
                f"rl/rewards/{name}": statistics.fmean(of_name),
                f"rl/reward_std/{name}": statistics.pstdev(of_name),
            }
        return cls(step, version, serialized, cursor, metrics, redrawn)


@dataclass(frozen=True)
class Counts:
    """A snapshot of counters; `since(earlier)` turns the difference into metrics."""

    time: float = 0.0
    """`time.monotonic()`."""
    deaths: int = 0
    busy_s: dict[str, float] = field(default_factory=dict)
    """Seconds that each actor has worked, by name."""

    def since(self, before: Counts) -> dict[str, float]:
        """The share of the time since `before` in which each actor had no work, and how many actors died."""
        seconds = self.time - before.time
        idle = {
            f"idle/{name}": min(1.0, max(0.0, 1.0 - (busy - before.busy_s.get(name, 0.0)) / seconds))
            for name, busy in self.busy_s.items()
        }
        # Deaths while weights were loaded count as well: nobody else reports them.
        return idle | {"rollout/replacements": float(self.deaths - before.deaths)}
