"""The learner of reinforcement learning: the loop that runs inside Ray Train's workers.

    restore, then per step { send weights, next batch, update, now and then a checkpoint }

It owns the policy, and the value model of an algorithm that has one. The reference policy and the reward model are
frozen and live with the scorers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from actors.pools.remote import ActorDied, Remote, fetch
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator_link import CoordinatorLink, Setup
from actors.rollouts.groups import Cursor
from actors.rollouts.publisher import Publisher
from actors.training.dev_answers import DevAnswers, DevPrompt
from actors.training.loop import Loop, LoopArguments
from actors.training.token_looks import looks_due, write_looks
from rayrlhf.algorithms.registry import make_trainer
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.lora import load_trained_state, trained_state
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import save_model
from rayrlhf.plugins import Plugin
from rayrlhf.runs.ledger import Ledger
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory, derive_seed


@dataclass(frozen=True)
class RLArguments(LoopArguments):
    """What every worker needs; picklable, paths absolute."""

    policy: str
    """Path or URI, as the next one."""
    value_model: str | None
    """The reward model's directory, or the policy's, which gets a fresh head; None for algorithms without a critic."""
    coordinator: Remote
    plugin: Plugin | None = None
    """The file of an algorithm of the user's own."""
    dev: Any = ()
    """list[DevPrompt] to look at while it trains, or `actors.pools.remote.put` of it."""
    setup: Setup = field(default_factory=Setup)
    """What to tell a coordinator that takes the place of this one."""


def rl_loop(args: RLArguments) -> None:
    """Train the policy; the finished one appears as the run folder's `policy/`.

    It does not if the loop was asked to stop: it then ends after the step's checkpoint.

    Raises:
        UserError: an alarm says that nothing can be learnt (`alarms.max_steps_without_spread`).
        FloatingPointError: a gradient or a weight is not finite.
    """
    config = args.config
    with Loop("rl", args) as loop:
        tokenizer = load_tokenizer(local_copy(args.policy))
        found = loop.restore()
        policy, value_model = load_models(loop, args, found)
        forward_of = partial(
            Forward,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=config.rl.micro_batch_tokens,
            dtype=config.model.dtype,
        )
        trainer = make_trainer(
            config.rl, forward_of(policy), forward_of(value_model) if value_model else None, loop.ranks,
            max_response_tokens=config.data.max_response_tokens, seed=config.seed, plugin=args.plugin,
            normalized={reward.name: reward.weight for reward in config.rewards if reward.normalize},
        )  # fmt: skip
        generators = GeneratorLink(CoordinatorLink(args.coordinator, args.setup, config), loop.ranks, policy)
        version, cursor = 0, Cursor(0)
        if found:
            _, state = found
            trainer.load_state_dict(state["trainer"])
            version, cursor = state["version"], Cursor(*state["cursor"])
        generators.begin(cursor)
        dev_prompts: list[DevPrompt] = fetch(args.dev)

        def save_policy(directory: Path) -> None:
            save_model(policy, tokenizer, directory, stop_tokens=config.data.stop_tokens)

        dev = DevAnswers(loop, dev_prompts, tokenizer, save_policy, generators.answer, args.checkpoints, found)

        def save_models(directory: Path) -> None:
            save_policy(directory / "policy")
            if value_model is not None:
                save_model(value_model, tokenizer, directory / "value_model")
            dev.save_best(directory)

        ledger = Ledger(loop.run) if loop.ranks.first else None
        loop.steps = config.rl.steps
        while loop.step < config.rl.steps:
            started = time.perf_counter()
            version = generators.send_weights(after=version)
            waiting = time.perf_counter()
            batch = generators.next_batch(loop.step, version)
            arrived = time.perf_counter()
            # Not before the batch: keys and values of these prompts would be in the engines' prefix cache then.
            dev.look(version)
            if dev.enough:
                generators.begin(Cursor(config.rl.steps))  # no batch follows: nothing runs ahead any more
                break
            learning = time.perf_counter()
            metrics = trainer.step(batch.trajectories, loop.step)
            ended = time.perf_counter()
            seconds = (arrived - started) + (ended - learning)

            loop.step += 1
            loop.log(metrics | batch.metrics | {
                "rl/weight_version": version,
                "time/sync": waiting - started,
                "time/wait": arrived - waiting,
                "time/learn": ended - learning,
                "time/step": seconds,
                "memory/learner_peak_mib": loop.ranks.peak_memory_mib(),
                "idle/learner": (arrived - waiting) / seconds,
                "throughput/tokens_per_s": sum(t.length for t in batch.trajectories) / seconds,
            })  # fmt: skip
            if ledger:
                ledger.write(loop.step, version, batch.trajectories)
            if loop.ranks.first and looks_due(config.rl, loop.step):
                write_looks(loop.run, loop.step, trainer.looked_at, tokenizer, config.rl.missing_eos_reward)
            reason = loop.reason_to_stop
            stopping = loop.stopping() or reason is not None
            if loop.step < config.rl.steps and (stopping or loop.step % config.rl.checkpoint_every == 0):
                # Prompts and seeds are functions of (seed, step), and generators have no state to keep: the cursor
                # only says which prompts were trained on out of turn.
                state = {"version": version, "cursor": tuple(batch.cursor), "trainer": trainer.state_dict()}
                state |= dev.state_dict()
                if config.model.lora:
                    state["trained"] = [trained_state(model) for model in (policy, value_model) if model is not None]
                loop.save(state, save_models)
                if ledger:
                    ledger.upload()
                if reason is not None:
                    raise UserError(f"rl: stopped after step {loop.step}: {reason}")
                if stopping:
                    return
        if dev.due(last=True) and not dev.enough:
            version = generators.send_weights(after=version)
            dev.look(version, last=True)
        if ledger:
            ledger.upload()
        loop.finish(dev.publish)


def load_models(
    loop: Loop, args: RLArguments, found: tuple[Path, dict[str, Any]] | None
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Policy and value model, as they start or as the checkpoint has them; no value model without a critic."""
    config, device = args.config, loop.ranks.device
    checkpoint, state = found or (None, {})
    # Adapters belong to the weights that training started from; the checkpoint's models have them merged.
    source = None if config.model.lora else checkpoint
    policy = load_policy(str(source / "policy") if source else local_copy(args.policy), device=device)
    loop.trained("policy", policy, derive_seed(config.seed, "policy adapters"))
    value_model = None
    if args.value_model is not None:
        value_model = load_reward_model(
            str(source / "value_model") if source else local_copy(args.value_model), device=device,
            fresh_head_seed=derive_seed(config.seed, "value head"),  # for a model without one
        )  # fmt: skip
        loop.trained("value model", value_model, derive_seed(config.seed, "value adapters"))
    if "trained" in state:
        models = [model for model in (policy, value_model) if model is not None]
        for model, trained in zip(models, state["trained"], strict=True):
            load_trained_state(model, trained)
    return policy, value_model


class GeneratorLink:
    """The learner's line to the generators, by way of the coordinator. Rank 0 speaks first, the others listen.

    Rank 0 also brings another coordinator up to date where one has died.
    """

    def __init__(self, coordinator: CoordinatorLink, ranks: Ranks, policy: PreTrainedModel) -> None:
        self.coordinator, self.ranks = coordinator, ranks
        self.publisher = Publisher(policy, local=coordinator.remote.local)

    def begin(self, cursor: Cursor) -> None:
        self.coordinator.cursor = cursor
        if self.ranks.first:
            self.coordinator.call("begin", cursor)

    def send_weights(self, after: int) -> int:
        """Send the policy's weights under a new version, above `after`. Returns once they are copied, not once they
        are loaded: the next batch waits for that where it has to."""
        version = self.coordinator.send_weights(self.publisher.publish, after) if self.ranks.first else 0
        return int(self.ranks.broadcast(version))

    def next_batch(self, step: int, version: int) -> Batch:
        """The batch of `step`, the same on all ranks; what went wrong in loading the weights is raised here."""
        while True:
            batch, death = self._ask_for(step, version) if self.ranks.first else (None, None)
            death = self.ranks.broadcast(death)  # the others ask when the weights have arrived there
            if not self.ranks.first and death is None:
                batch, death = self._ask_for(step, version)
            # The coordinator may die after some ranks have their batch and others have not. Ahead of the learner its
            # successor makes another batch, so all ranks ask again.
            death = next(filter(None, self.ranks.gather(death)), None)
            if death is None:
                assert batch is not None
                self.coordinator.cursor = batch.cursor
                self.coordinator.forget_deaths()
                return batch
            if self.ranks.first:
                self.coordinator.replace(death)

    def answer(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """Scored answers outside the batches, from the weights of `version`, which were sent last. For rank 0 alone."""
        answers: list[Trajectory] = self.coordinator.call("answer", requests, sampling, version)
        return answers

    def _ask_for(self, step: int, version: int) -> tuple[Batch | None, ActorDied | None]:
        try:
            return self.coordinator.call_once("next_batch", step, version), None
        except ActorDied as death:
            return None, death
