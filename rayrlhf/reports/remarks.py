"""What a config asks for and may not mean, said once at the start of a run."""

from __future__ import annotations

from rayrlhf.config import Config
from rayrlhf.config_rewards import EnvironmentReward


def remarks(config: Config) -> list[str]:
    """One line each."""
    found = []
    if config.environment and not any(isinstance(reward, EnvironmentReward) for reward in config.rewards):
        found.append(
            "the environment answers the policy, but its rewards are not used: no reward has the kind environment"
        )
    return found
