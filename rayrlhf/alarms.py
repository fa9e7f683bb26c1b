"""What a step's metrics warn of, in one line each that says what it usually means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.config import Config


def alarms(metrics: Mapping[str, Any], config: Config) -> list[str]:
    """Warnings about one step (a line of metrics.jsonl)."""
    warnings = []
    if metrics.get("non_finite"):
        warnings.append(f"not finite: {', '.join(metrics['non_finite'])}; usually a learning rate that is too high")
    gap = metrics.get("ppo/logprob_gap/mean")
    if gap is not None and gap > config.ppo.max_logprob_gap:
        warnings.append(
            f"generator and learner differ by {gap:.3g} nats a token on the tokens that were sampled; "
            "usually stale weights, or another dtype or temperature on one side"
        )
    if metrics.get("rollout/replacements"):
        warnings.append(
            f"{metrics['rollout/replacements']:.0f} actor(s) died and were replaced in this step; their logs say why "
            "(often memory)"
        )
    return warnings
