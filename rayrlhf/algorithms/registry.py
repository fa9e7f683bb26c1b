"""The algorithms by their names in `rl.algorithm`, and the trainer of a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayrlhf.algorithms.base import Algorithm
from rayrlhf.algorithms.critic import Critic
from rayrlhf.algorithms.grpo import GRPO
from rayrlhf.algorithms.ppo import PPO
from rayrlhf.algorithms.reinforce_pp import ReinforcePP
from rayrlhf.algorithms.rloo import RLOO
from rayrlhf.algorithms.trainer import Trainer, updates_of
from rayrlhf.config_rl import CriticConfig, CustomConfig, RLConfig
from rayrlhf.errors import UserError, one_line
from rayrlhf.models.forward import Forward
from rayrlhf.models.ranks import Ranks
from rayrlhf.plugins import Plugin

ALGORITHMS: dict[str, Callable[[Any], Algorithm]] = {
    "ppo": PPO, "grpo": GRPO, "rloo": RLOO, "reinforce_pp": ReinforcePP,
}  # fmt: skip
"""Each is made of its section of the config (`rayrlhf.config_rl`)."""


def make_algorithm(config: RLConfig, plugin: Plugin | None = None) -> Algorithm:
    """The algorithm of `config.algorithm`.

    Args:
        plugin: the file of an algorithm that is not in `ALGORITHMS`.

    Raises:
        UserError: the file cannot be run, or what it names cannot be made or is no algorithm.
    """
    if config.algorithm in ALGORITHMS:
        return ALGORITHMS[config.algorithm](config)
    assert plugin is not None, "read by the driver"
    make = plugin.load()
    try:
        algorithm: Algorithm = make(config)
    except Exception as error:
        raise UserError(
            f"{plugin.path}: {plugin.name}(config) raised {type(error).__name__}: {one_line(error)}"
        ) from error
    missing = [method for method in ("advantages", "policy_loss") if not callable(getattr(algorithm, method, None))]
    if missing:
        raise UserError(f"{plugin.path}: {plugin.name} has no method {' and no '.join(missing)}")
    return algorithm


def read_plugin(config: RLConfig) -> Plugin | None:
    """The file of an algorithm of the user's own; None for those of this package."""
    return Plugin.read(config.path, "rl.path") if isinstance(config, CustomConfig) else None


def make_trainer(
    config: RLConfig,
    policy: Forward,
    value_model: Forward | None,
    ranks: Ranks,
    *,
    max_response_tokens: int,
    seed: int,
    plugin: Plugin | None = None,
    normalized: Mapping[str, float] | None = None,
) -> Trainer:
    """The trainer of `config.algorithm`; see `Trainer` for the arguments.

    Args:
        value_model: a model with a scalar head, for an algorithm with a critic.
        plugin: as for `make_algorithm`.
        normalized: as for `Trainer`.
    """
    critic = None
    if isinstance(config, CriticConfig):
        assert value_model is not None, "the algorithm has a critic"
        critic = Critic(value_model, config, updates_of(config))
    return Trainer(
        make_algorithm(config, plugin), policy, critic, config, ranks,
        max_response_tokens=max_response_tokens, seed=seed, normalized=normalized,
    )  # fmt: skip
