"""The PPO learner: the loop that runs inside Ray Train's workers.

    restore, then per step { publish weights, next batch, PPO update, report }

It owns the policy and the value model; the reference policy and the reward model are frozen and live with the scorers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.pools.monitoring import metrics_writer
from actors.pools.remote import Call, Remote, wait
from actors.rollouts.ahead import Cursor
from actors.rollouts.batch import Batch
from actors.rollouts.publisher import Publisher
from actors.training.fit import report, restored
from rayrlhf.algorithms.ppo import PPO
from rayrlhf.config import Config
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import checkpoint_gradients, load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.lora import add_adapters, load_trained_state, trained_state
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import save_model
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import derive_seed


@dataclass(frozen=True)
class LearnerArguments:
    """What every worker needs; picklable, paths absolute."""

    config: Config
    run_dir: str
    """Path or URI, as the next two."""
    policy: str
    value_model: str
    """A model directory with a scalar head: the reward model."""
    coordinator: Remote


@dataclass(frozen=True)
class State:
    """A checkpoint beside its two model directories.

    With LoRA those are merged, and training goes on from the adapters in `trained`.
    Prompts and all seeds are functions of (seed, step): the cursor only says which of them were trained on out of
    turn, and generators have no state to keep.
    """

    step: int
    version: int
    cursor: tuple[int, tuple[int, ...]]
    ppo: dict[str, Any]
    trained: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None
    """Of policy and value model."""

    @classmethod
    def read(cls, directory: Path) -> State:
        return cls(**torch.load(directory / "state.pt", weights_only=True, map_location="cpu"))


def ppo_loop(arguments: dict[str, Any]) -> None:
    """Train the policy with PPO; the finished one appears as the run folder's `policy/`.

    It does not if the coordinator was asked to stop: the loop then ends after the step's checkpoint.
    """
    args: LearnerArguments = arguments["learner"]
    config, coordinator = args.config, args.coordinator
    ranks = Ranks(config.resources.learner.threads, gpu=config.resources.learner.gpus > 0)
    tokenizer = load_tokenizer(local_copy(args.policy))
    with restored() as checkpoint:
        state = State.read(checkpoint) if checkpoint else None
        policy, value_model = load_models(args, checkpoint, state, ranks)
    forward_of = partial(
        Forward, pad_token_id=tokenizer.pad_token_id, max_tokens=config.ppo.micro_batch_tokens, dtype=config.model.dtype
    )
    ppo = PPO(forward_of(policy), forward_of(value_model), config.ppo, ranks, seed=config.seed)
    if state:
        ppo.load_state_dict(state.ppo)

    first = state.step + 1 if state else 0
    version = state.version if state else 0
    log = metrics_writer(args.run_dir, config.name) if ranks.first else None
    generators = GeneratorLink(coordinator, config, ranks, policy)
    generators.begin(Cursor(*state.cursor) if state else Cursor(0))
    for step in range(first, config.ppo.steps):
        started = time.perf_counter()
        version = generators.send_weights(after=version)
        waiting = time.perf_counter()
        batch = generators.next_batch(step, version)
        learning = time.perf_counter()
        metrics = ppo.step(batch.trajectories, step)
        ended = time.perf_counter()

        metrics |= batch.metrics | {
            "ppo/weight_version": version,
            "time/sync": waiting - started,
            "time/wait": learning - waiting,
            "time/learn": ended - learning,
            "time/step": ended - started,
            "memory/learner_peak_mib": ranks.peak_memory_mib(),
            "idle/learner": (learning - waiting) / (ended - started),
            "throughput/tokens_per_s": sum(t.length for t in batch.trajectories) / (ended - started),
        }
        if log:
            log.write("ppo", step + 1, metrics)
        stopping = generators.stop_requested()
        if (stopping or (step + 1) % config.ppo.checkpoint_every == 0) and step + 1 < config.ppo.steps:
            trained = (trained_state(policy), trained_state(value_model)) if config.model.lora else None
            at = State(step, version, (batch.cursor.next_step, batch.cursor.untrained), ppo.state_dict(), trained)
            report(ranks, {"step": step}, lambda directory, at=at: write_checkpoint(directory, ppo, tokenizer, at))  # type: ignore[misc]
            if stopping:
                break
    else:
        if ranks.first:
            with RunFolder(args.run_dir).writing("ppo") as directory:
                save_model(policy, tokenizer, directory)
    if log:
        log.close()


def load_models(
    args: LearnerArguments, checkpoint: Path | None, state: State | None, ranks: Ranks
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and value model, as they start or as the checkpoint has them."""
    config = args.config
    lora = config.model.lora
    # Adapters belong to the weights that training started from; the checkpoint's models have them merged.
    source = None if lora else checkpoint
    policy = load_policy(str(source / "policy") if source else local_copy(args.policy), device=ranks.device)
    value_path = str(source / "value_model") if source else local_copy(args.value_model)
    value_model = load_reward_model(value_path, device=ranks.device)
    if lora:
        add_adapters(policy, lora, derive_seed(config.seed, "policy adapters"))
        add_adapters(value_model, lora, derive_seed(config.seed, "value adapters"))
    if state and state.trained:
        for model, trained in zip((policy, value_model), state.trained, strict=True):
            load_trained_state(model, trained)
    if config.resources.learner.gradient_checkpointing:
        checkpoint_gradients(policy)
        checkpoint_gradients(value_model)
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


def write_checkpoint(directory: Path, ppo: PPO, tokenizer: PreTrainedTokenizerBase, state: State) -> None:
    save_model(ppo.policy.model, tokenizer, directory / "policy")
    save_model(ppo.value_model.model, tokenizer, directory / "value_model")
    torch.save(vars(state), directory / "state.pt")
