"""Make generators and scorers: their arguments, and which nodes they may be on."""

from __future__ import annotations

from typing import Any

from actors.pools.remote import Remote, namespace
from actors.rollouts.engine import environment_variables
from actors.rollouts.generator import Generator
from actors.rollouts.scorer import Scorer
from rayrlhf.config import Config
from rayrlhf.config_resources import GeneratorConfig, ScorerConfig
from rayrlhf.environments.base import EnvironmentMaker


def spawn_generator(
    name: str, config: Config, model: str, max_model_len: int, environment: EnvironmentMaker | None, local: bool
) -> Remote:
    """A generator of `model`, a directory or a hub name, in this process if `local`."""
    settings = config.resources.generators
    return Remote.spawn(
        name,
        Generator,
        name,
        config.model.model_copy(update={"path": model}),
        settings,
        max_model_len,
        config.seed,
        environment,
        local=local,
        # Set before the process starts, because OpenMP reads its settings only then.
        options=_options(config, settings) | {"runtime_env": {"env_vars": environment_variables(settings)}},
    )


def spawn_scorer(
    name: str,
    config: Config,
    reward_model: str | None,
    reference: str,
    pad_token_id: int,
    gold: Any,
    texts: Any,
    local: bool,
) -> Remote:
    """A scorer with these models. `gold` and `texts` are what `Scorer` takes, Ray references to them, or None."""
    settings = config.resources.scorers
    return Remote.spawn(
        name,
        Scorer,
        name,
        reward_model,
        reference,
        settings,
        local=local,
        options=_options(config, settings),
        rewards=config.scored_by,
        texts=texts,
        gold=gold,
        pad_token_id=pad_token_id,
        dtype=config.model.dtype,
    )


def _options(config: Config, settings: GeneratorConfig | ScorerConfig) -> dict[str, Any]:
    """Ray's options for an actor. SPREAD: over all nodes with the labels, and outside the placement group of a Tune
    trial, which has no room for the trial's actors."""
    return {
        "num_cpus": settings.cpus,
        "num_gpus": settings.gpus,
        "namespace": namespace(config),
        "scheduling_strategy": "SPREAD",
        "label_selector": settings.labels or None,
    }
