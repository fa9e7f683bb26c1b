"""What the stages of one run share: config, run folder, Ray connection and the rollout coordinator."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from actors.pools.monitoring import CONTROL
from actors.pools.remote import Call, Remote, namespace, wait
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.weight_sync import publish_directory
from actors.training.loop import LoopArguments
from actors.training.workers import TrainingLoop, Workers
from jobs.cluster import connected, inside_job, preflight
from jobs.console import console
from jobs.follow import following
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config
from rayrlhf.data.comparisons import RankedAnswers, from_comparisons
from rayrlhf.data.loading import Split
from rayrlhf.data.prompts import EncodedPrompt, requests_for
from rayrlhf.data.records import Demonstration
from rayrlhf.data.sources import as_prompts, read_demonstrations, read_published
from rayrlhf.data.splits import Splits, check_disjoint, split_train, split_valid
from rayrlhf.data.tokens import check_context, encode_prompts
from rayrlhf.models.loading import context_length, load_tokenizer, parameter_counts, resolve_model
from rayrlhf.reports.progress import batch_table
from rayrlhf.rewards.gold import GoldMeasure, gold_labeller
from rayrlhf.rewards.labellers import check_labeller
from rayrlhf.runs.addresses import join
from rayrlhf.runs.folder import RunFolder, open_or_create, runs_address
from rayrlhf.runs.stages import stages_to
from rayrlhf.trajectory import Sampling, Trajectory

T = TypeVar("T")
KEPT_CHECKPOINTS = 2
"""Of SFT and the reward model: where one is damaged, the one before it is taken."""
SLICE = 1024
"""Responses that one generator or scorer is asked for at a time, outside PPO."""


class Session:
    """One run while it is being worked on. Pools start when a stage first needs them, and serve the later stages."""

    def __init__(self, config: Config, run: RunFolder, local: bool) -> None:
        self.config, self.run, self.local = config, run, local
        self.model = resolve_model(config.model.path)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.model, config.model.revision)
        check_context(config.data.max_prompt_tokens, config.data.max_response_tokens, context_length(self.model))
        self.workers = Workers(
            config.resources.learner, run.address_of(run.checkpoints), f"workers-{config.name}", local=local
        )
        """The learner's, which serve every training stage."""
        self._coordinator: Remote | None = None
        self._starting: Call | None = None
        self._connection = contextlib.ExitStack()
        self._started = False
        self.placement: Table | None = None
        """Who goes to which node; None before the start, and if local."""

    def start(self) -> bool:
        """Read the data, connect to Ray (not if local): mistakes in the data show before a cluster starts.

        Returns whether this was the first call; later ones do nothing.
        """
        if self._started:
            return False
        self.train_splits, self.published_comparisons, self.parameters  # noqa: B018
        if self.config.data.comparisons is None:
            check_labeller(self.config.collect.labeller)
        if not self.local:
            self._connection.enter_context(connected(self.config))
            self.run.note_in_lock(f"Ray at {ray.get_runtime_context().gcs_address}")
            self.placement = preflight(self.config)
        self._started = True
        return True

    def overview(self) -> Table:
        """What the config's batch numbers mean in steps, samples, tokens and memory."""
        splits = self.train_splits
        published = None
        if self.config.data.comparisons is not None:
            published = sum(not c.heldout for c in self.published_comparisons)
        return batch_table(
            self.config, len(splits.sft), len(splits.ppo), published, len(self.evaluated), self.parameters
        )

    def close(self) -> None:
        """End the actors, and the Ray connection if it is this session's own."""
        try:
            self.workers.close()
        finally:  # also at a second Ctrl-C
            self._connection.close()
            if self._coordinator is not None and ray.is_initialized():  # a connection that others go on using
                self._coordinator.kill()  # and with it generators and scorers, which it owns

    def checkpoint_name(self, stage: str) -> str:
        """Where a stage's checkpoints go: marked by everything that decides its result, so that a run whose settings
        changed starts the stage anew in place of continuing from weights of other settings."""
        settings = dump_config(self.config)
        relevant = {key: settings[key] for key in ("seed", "model", "data", *stages_to(stage))}
        for key in ("checkpoint_every", "keep_checkpoints"):
            relevant.get("ppo", {}).pop(key, None)
        digest = hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"{stage}-{digest}"

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """The policy's frozen and trained ones."""
        return parameter_counts(self.model, self.config.model.revision, self.config.model.lora)

    # ---- data

    @cached_property
    def train_splits(self) -> Splits[Demonstration]:
        splits = split_train(self._read("train"), self.config.data)
        check_disjoint(sft=splits.sft, reward_model=splits.reward_model, ppo=splits.ppo, dev=self.dev, test=self.test)
        return splits

    @cached_property
    def _valid(self) -> tuple[list[Demonstration], list[Demonstration]]:
        return split_valid(self._read("valid"), self.config.data)

    @cached_property
    def published_comparisons(self) -> list[RankedAnswers]:
        """The comparisons of `data.comparisons`, its validation split held out; none without it."""
        data = self.config.data
        if data.comparisons is None:
            return []
        ranked: list[RankedAnswers] = []
        splits: tuple[Split, ...] = ("train", "valid")
        for split in splits:
            found, dropped = read_published(data.comparisons, split, self.tokenizer, data.max_prompt_tokens)
            own = from_comparisons(found, self.tokenizer, data.max_response_tokens, heldout=split == "valid")
            if len(own) < len(found):
                dropped["equal_when_cut"] = len(found) - len(own)
            counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none"
            print(f"{len(own)} {split} comparisons from {data.comparisons.path}; dropped: {counts}", flush=True)
            ranked += own
        return ranked

    @property
    def dev(self) -> list[Demonstration]:
        return self._valid[0]

    @property
    def test(self) -> list[Demonstration]:
        return self._valid[1]

    @property
    def evaluated(self) -> list[Demonstration]:
        """The records of `evaluate.split`."""
        return self.dev if self.config.evaluate.split == "dev" else self.test

    def encode(self, records: list[Demonstration]) -> list[EncodedPrompt]:
        """The prompts of `records` as token ids."""
        ids = encode_prompts(self.tokenizer, [record.prompt for record in records])
        return [EncodedPrompt(record.id, tuple(own)) for record, own in zip(records, ids, strict=True)]

    def _read(self, split: Split) -> list[Demonstration]:
        data = self.config.data
        return read_demonstrations(data.demonstrations, split, self.tokenizer, data.max_prompt_tokens)

    # ---- training

    def loop_arguments(self, stage: str) -> dict[str, Any]:
        """What every training loop is told, see `actors.training.loop.LoopArguments`."""
        keep = self.config.ppo.keep_checkpoints if stage == "ppo" else KEPT_CHECKPOINTS
        return {
            "config": self.config,
            "run_dir": self.run.address,
            "checkpoints": self.checkpoint_name(stage),
            "keep_checkpoints": keep,
        }

    def warm_up(self, generators: bool) -> None:
        """Begin to start the learner's workers, and the generators if asked to, while the driver prepares the data."""
        self.workers.start()
        if generators:
            self.coordinator  # noqa: B018  (its generators begin to start)

    def train(self, stage: str, loop: TrainingLoop, arguments: LoopArguments) -> None:
        """Run a training loop on the learner's workers and show each of its steps; see `Workers.train` for errors."""
        with following(self.run, self.config, stage, console):
            self.workers.train(loop, arguments)

    # ---- generation

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.config.data.max_response_tokens, self.tokenizer.eos_token_id)

    @property
    def coordinator(self) -> Remote:
        """The rollout coordinator; its generators begin to start and are waited for at the first use."""
        if self._coordinator is None:
            data = self.config.data
            self._coordinator = Remote.spawn(
                "coordinator",
                Coordinator,
                self.config,
                self.model,
                data.max_prompt_tokens + data.max_response_tokens,
                self.tokenizer.pad_token_id,
                self.local,
                local=self.local,
                options={} if self.local else {"num_cpus": 0, "namespace": namespace(self.config), **_here()},
                concurrency_groups={CONTROL: 1},
            )
            self._starting = self._coordinator.submit("start_generators")
        return self._coordinator

    def wait_for_generators(self) -> None:
        """Returns when the generators are ready; raises ActorFailure naming the one that is not."""
        coordinator = self.coordinator
        assert self._starting is not None
        wait([self._starting], self.config.resources.coordinator_timeout_s)
        assert coordinator is not None

    def load_weights(self, directory: Path) -> int:
        """Put the weights of a saved model on all generators; returns their version."""
        timeout = self.config.resources.coordinator_timeout_s
        self.wait_for_generators()
        version: int = self.coordinator.call("next_version", timeout_s=timeout)
        publication = publish_directory(self.run.download(directory), version, local=self.local)
        self.coordinator.call("load_weights", publication, timeout_s=timeout)
        return version

    def generate(
        self, records: list[Demonstration], temperature: float, version: int, *seed_parts: int | str, samples: int = 1
    ) -> list[Trajectory]:
        """`samples` responses for each record's prompt, in order, from the weights of `version`."""
        requests = requests_for(self.encode(records), samples, self.config.seed, *seed_parts)
        sampling = self.sampling(temperature)
        done: list[Trajectory] = []
        for piece in self._slices(requests, self.config.resources.generators.count, "sampled"):
            done += self._call("generate", piece, sampling, version)
        return done

    def start_scorers(self, reward_model: Path, reference: Path, measured: list[Demonstration] | None = None) -> None:
        """Scorers with these models; those of `measured` also have the gold measure of responses to these records."""
        gold = GoldMeasure(gold_labeller(self.config), as_prompts(measured), self.tokenizer) if measured else None
        self._call("start_scorers", self.run.address_of(reward_model), self.run.address_of(reference), gold)

    def score(self, trajectories: list[Trajectory], temperature: float) -> list[Trajectory]:
        """Rewards and reference log-probs filled in."""
        done: list[Trajectory] = []
        for piece in self._slices(trajectories, self.config.resources.scorers.count, "scored"):
            done += self._call("score", piece, temperature)
        return done

    def _call(self, method: str, *args: Any) -> Any:
        return self.coordinator.call(method, *args, timeout_s=self.config.resources.coordinator_timeout_s)

    def _slices(self, work: list[T], actors: int, done: str) -> Iterator[list[T]]:
        """Pieces that one time-out may bound whatever the amount of work; long work says how far it is."""
        size = SLICE * actors
        for start in range(0, len(work), size):
            if start:
                print(f"{done} {start} of {len(work)}", flush=True)
            yield work[start : start + size]


def _here() -> dict[str, Any]:
    """On the driver's node, which is not one that may vanish; and outside the placement group of a Tune trial."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@contextlib.contextmanager
def opened(config: Config, local: bool = False) -> Iterator[Session]:
    """The run's folder (locked) and a `Session` over it; it connects to Ray when a stage starts (never if `local`)."""
    runs_dir = runs_address(config.runs_dir, inside_job())
    # Not as it was typed: `namespace` of the run's actors is made of it, and config.yaml tells `rayrlhf status`.
    config = config.model_copy(update={"runs_dir": runs_dir})
    # An evaluation of another file is no part of the run: it neither conflicts with a finished one nor is recorded.
    recorded = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": None})})
    run = RunFolder(join(runs_dir, config.name))
    with run.lock():
        open_or_create(recorded, runs_dir)
        session = Session(config, run, local)
        try:
            yield session
        finally:
            session.close()
