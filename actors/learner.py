"""The PPO learner: the loop that runs inside Ray Train's workers.

    restore, publish weights, then per step { next batch, PPO update, publish, report }

It owns the policy and the value model; the reference policy and the reward model are frozen and live with the scorers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.remote import Remote
from actors.train import report, restored
from actors.weight_sync import publish
from rayrlhf.config import Config
from rayrlhf.distributed import Ranks
from rayrlhf.metrics import MetricsWriter
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer, save_model
from rayrlhf.ppo import PPO
from rayrlhf.run import RunFolder


@dataclass(frozen=True)
class LearnerArguments:
    """What every worker needs; picklable, paths absolute."""

    config: Config
    run_dir: Path
    policy: Path
    value_model: Path
    """A model directory with a scalar head: the reward model."""
    coordinator: Remote


@dataclass(frozen=True)
class State:
    """A checkpoint beside its two model directories.

    Prompts and all seeds are functions of (seed, step), so there is no data cursor and no generator state to keep.
    """

    step: int
    version: int
    ppo: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> State:
        return cls(**torch.load(directory / "state.pt", weights_only=True, map_location="cpu"))


def ppo_loop(arguments: dict[str, Any]) -> None:
    """Train the policy with PPO; the finished one appears as the run folder's `policy/`."""
    args: LearnerArguments = arguments["learner"]
    config, coordinator = args.config, args.coordinator
    ranks = Ranks(config.resources.learner.threads, gpu=config.resources.learner.gpus > 0)
    tokenizer = load_tokenizer(str(args.policy))
    with restored() as checkpoint:
        state = State.read(checkpoint) if checkpoint else None
        policy = load_policy(str(checkpoint / "policy" if checkpoint else args.policy), device=ranks.device)
        value_model = load_reward_model(
            str(checkpoint / "value_model" if checkpoint else args.value_model), device=ranks.device
        )
    ppo = PPO(
        policy,
        value_model,
        config.ppo,
        ranks,
        pad_token_id=tokenizer.pad_token_id,
        dtype=config.model.dtype,
        seed=config.seed,
    )
    if state:
        ppo.load_state_dict(state.ppo)

    first = state.step + 1 if state else 0
    log = MetricsWriter(args.run_dir) if ranks.first else None
    version = publish_weights(policy, coordinator, config, ranks, after=state.version if state else 0)
    for step in range(first, config.ppo.steps):
        started = time.perf_counter()
        batch = coordinator.call("next_batch", step, version, timeout_s=config.resources.coordinator_timeout_s)
        learning = time.perf_counter()
        metrics = ppo.step(batch.trajectories, step)
        syncing = time.perf_counter()
        version = publish_weights(policy, coordinator, config, ranks, after=version)
        ended = time.perf_counter()

        metrics |= batch.metrics | {
            "ppo/weight_version": batch.version,
            "time/learn": syncing - learning,
            "time/sync": ended - syncing,
            "time/step": ended - started,
            "throughput/tokens_per_s": sum(t.length for t in batch.trajectories) / (ended - started),
        }
        if log:
            log.write("ppo", step, metrics)
        if (step + 1) % config.ppo.checkpoint_every == 0 and step + 1 < config.ppo.steps:
            at = State(step, version, ppo.state_dict())
            report(ranks, {"step": step}, lambda directory, at=at: write_checkpoint(directory, ppo, tokenizer, at))  # type: ignore[misc]

    if ranks.first:
        with RunFolder(args.run_dir).writing("ppo") as directory:
            save_model(policy, tokenizer, directory)
    if log:
        log.close()


def publish_weights(policy: PreTrainedModel, coordinator: Remote, config: Config, ranks: Ranks, after: int) -> int:
    """Send the policy to all generators; returns its version, which is above `after`, once all of them have it."""
    version = 0
    if ranks.first:
        timeout = config.resources.coordinator_timeout_s
        version = coordinator.call("next_version", after, timeout_s=timeout)
        publication = publish(policy.named_parameters(), version, local=coordinator.local)
        coordinator.call("load_weights", publication, timeout_s=timeout)
    return int(ranks.broadcast(version))


def write_checkpoint(directory: Path, ppo: PPO, tokenizer: PreTrainedTokenizerBase, state: State) -> None:
    save_model(ppo.policy, tokenizer, directory / "policy")
    save_model(ppo.value_model, tokenizer, directory / "value_model")
    torch.save(vars(state), directory / "state.pt")
