"""The PPO learner: the loop that runs inside Ray Train's workers.

    restore, then per step { send weights, next batch, PPO update, now and then a checkpoint }

It owns the policy and the value model; the reference policy and the reward model are frozen and live with the scorers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from actors.pools.remote import Call, Remote, wait
from actors.rollouts.batch import Batch
from actors.rollouts.groups import Cursor
from actors.rollouts.publisher import Publisher
from actors.training.loop import Loop, LoopArguments
from rayrlhf.algorithms.ppo import PPO
from rayrlhf.config import Config
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.lora import load_trained_state, trained_state
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import save_model
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import derive_seed


@dataclass(frozen=True)
class PPOArguments(LoopArguments):
    """What every worker needs; picklable, paths absolute."""

    policy: str
    """Path or URI, as the next one."""
    value_model: str
    """A model directory with a scalar head: the reward model."""
    coordinator: Remote


def ppo_loop(args: PPOArguments) -> None:
    """Train the policy with PPO; the finished one appears as the run folder's `policy/`.

    It does not if the coordinator was asked to stop: the loop then ends after the step's checkpoint.
    """
    config = args.config
    with Loop("ppo", args) as loop:
        tokenizer = load_tokenizer(local_copy(args.policy))
        found = loop.restore()
        policy, value_model = load_models(loop, args, found)
        forward_of = partial(
            Forward,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=config.ppo.micro_batch_tokens,
            dtype=config.model.dtype,
        )
        ppo = PPO(forward_of(policy), forward_of(value_model), config.ppo, loop.ranks, seed=config.seed)
        generators = GeneratorLink(args.coordinator, config, loop.ranks, policy)
        version, cursor = 0, Cursor(0)
        if found:
            _, state = found
            ppo.load_state_dict(state["ppo"])
            version, cursor = state["version"], Cursor(*state["cursor"])
        generators.begin(cursor)

        def save_models(directory: Path) -> None:
            save_model(policy, tokenizer, directory / "policy")
            save_model(value_model, tokenizer, directory / "value_model")

        loop.steps = config.ppo.steps
        while loop.step < config.ppo.steps:
            started = time.perf_counter()
            version = generators.send_weights(after=version)
            waiting = time.perf_counter()
            batch = generators.next_batch(loop.step, version)
            learning = time.perf_counter()
            metrics = ppo.step(batch.trajectories, loop.step)
            ended = time.perf_counter()

            loop.step += 1
            loop.log(metrics | batch.metrics | {
                "ppo/weight_version": version,
                "time/sync": waiting - started,
                "time/wait": learning - waiting,
                "time/learn": ended - learning,
                "time/step": ended - started,
                "memory/learner_peak_mib": loop.ranks.peak_memory_mib(),
                "idle/learner": (learning - waiting) / (ended - started),
                "throughput/tokens_per_s": sum(t.length for t in batch.trajectories) / (ended - started),
            })  # fmt: skip
            stopping = generators.stop_requested()
            if loop.step < config.ppo.steps and (stopping or loop.step % config.ppo.checkpoint_every == 0):
                # Prompts and seeds are functions of (seed, step), and generators have no state to keep: the cursor
                # only says which prompts were trained on out of turn.
                state = {"version": version, "cursor": tuple(batch.cursor), "ppo": ppo.state_dict()}
                if config.model.lora:
                    state["trained"] = [trained_state(model) for model in (policy, value_model)]
                loop.save(state, save_models)
                if stopping:
                    return
        loop.finish(lambda directory: save_model(policy, tokenizer, directory))


def load_models(
    loop: Loop, args: PPOArguments, found: tuple[Path, dict[str, Any]] | None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and value model, as they start or as the checkpoint has them."""
    config, device = args.config, loop.ranks.device
    checkpoint, state = found or (None, {})
    # Adapters belong to the weights that training started from; the checkpoint's models have them merged.
    source = None if config.model.lora else checkpoint
    policy = load_policy(str(source / "policy") if source else local_copy(args.policy), device=device)
    value_model = load_reward_model(
        str(source / "value_model") if source else local_copy(args.value_model), device=device
    )
    loop.trained("policy", policy, derive_seed(config.seed, "policy adapters"))
    loop.trained("value model", value_model, derive_seed(config.seed, "value adapters"))
    if "trained" in state:
        for model, trained in zip((policy, value_model), state["trained"], strict=True):
            load_trained_state(model, trained)
    return policy, value_model


class GeneratorLink:
    """The learner's line to the generators, by way of the coordinator. Rank 0 speaks first, the others listen."""

    def __init__(self, coordinator: Remote, config: Config, ranks: Ranks, policy: PreTrainedModel) -> None:
        self.coordinator, self.ranks = coordinator, ranks
        self.publisher = Publisher(policy, local=coordinator.local)
        self.timeout_s = config.resources.coordinator_timeout_s
        self.loading: list[Call] = []

    def begin(self, cursor: Cursor) -> None:
        if self.ranks.first:
            self.coordinator.call("begin", cursor, timeout_s=self.timeout_s)

    def send_weights(self, after: int) -> int:
        """Send the policy's weights under a new version, above `after`. Returns once they are copied, not once they
        are loaded: the next batch waits for that where it has to."""
        version = 0
        if self.ranks.first:
            version = self.coordinator.call("next_version", after, timeout_s=self.timeout_s)
            self.loading = [self.coordinator.submit("load_weights", self.publisher.publish(version))]
        return int(self.ranks.broadcast(version))

    def next_batch(self, step: int, version: int) -> Batch:
        """The batch of `step`; what went wrong in loading the weights is raised here."""
        batch: Batch | None = None
        if self.ranks.first:
            # In this order: the coordinator answers the second call after the first.
            calls = [*self.loading, self.coordinator.submit("next_batch", step, version)]
            batch = wait(calls, self.timeout_s)[-1]
        self.ranks.broadcast(None)  # the others ask when the weights have arrived there
        if batch is None:
            batch = self.coordinator.call("next_batch", step, version, timeout_s=self.timeout_s)
        return batch

    def stop_requested(self) -> bool:
        """Whether the run is to end early; the same on all ranks."""
        asked = self.ranks.first and self.coordinator.call("stop_requested", timeout_s=self.timeout_s)
        return bool(self.ranks.broadcast(asked))
