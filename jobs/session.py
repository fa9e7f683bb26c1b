"""What the stages of one run share: config, run folder, data, Ray connection, workers and coordinator."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import ray
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from actors.training.loop import LoopArguments
from actors.training.workers import TrainingLoop, Workers
from jobs.choices import asks_for_machines, with_lengths, with_resources
from jobs.cluster import connected, has_cluster, inside_job, preflight
from jobs.console import console, warn
from jobs.failing import recorded
from jobs.follow import following
from jobs.rollouts import RolloutClient
from jobs.stopping import asking_first
from jobs.tracking import Tracking
from rayrlhf.algorithms.registry import make_algorithm, read_plugin
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config
from rayrlhf.config_services import HOW_ASKED
from rayrlhf.config_stages import StageName
from rayrlhf.data.run_data import RunData
from rayrlhf.data.tokens import check_context
from rayrlhf.errors import UserError, naming
from rayrlhf.models.checks import check_architecture, check_head_size, parameter_counts
from rayrlhf.models.ends import with_ends
from rayrlhf.models.loading import context_length, load_tokenizer
from rayrlhf.models.roles import check_policy, check_reward_model
from rayrlhf.reports.progress import batch_table
from rayrlhf.reports.remarks import remarks
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.rewards.gold import gold_labeller
from rayrlhf.rewards.labeller import Labeller
from rayrlhf.rewards.labellers import check_labeller
from rayrlhf.runs.addresses import join, runs_address
from rayrlhf.runs.changes import MICRO_BATCH
from rayrlhf.runs.contents import hashes, read_contents
from rayrlhf.runs.error_log import note
from rayrlhf.runs.folder import RunFolder, open_or_create, stored_contents
from rayrlhf.runs.room import check_room, needed
from rayrlhf.runs.rounds import has_rounds, round_name
from rayrlhf.runs.sharing import take_over
from rayrlhf.runs.stages import stages_from, stages_of, stages_to
from rayrlhf.runs.starts import Starts, find_models
from rayrlhf.runs.storage import local_copy
from rayrlhf.tracking.registry import check_trackers

_SAMPLING: tuple[StageName, ...] = ("sft", "collect", "rl", "evaluate")
"""The stages that have generators."""
KEPT_CHECKPOINTS = 2
"""Of SFT and the reward model: where one is damaged, the one before it is taken."""


class Session:
    """One run while it is being worked on. Pools start when a stage first needs them, and serve the later stages."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        starts: Starts,
        local: bool,
        choices: Iterable[str] = (),
        connection: contextlib.ExitStack | None = None,
    ) -> None:
        """
        Args:
            choices: lines about what was chosen where the config says nothing; the start prints them.
            connection: what the connection to Ray is closed with; None: it is closed with the session.
        """
        self._choices = tuple(choices)
        self.model = local_copy(starts.base)
        """The model with whose tokenizer and architecture the run begins: a directory or a hub name."""
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.model, config.model.revision)
        critic = config.has("rl") and config.rl.critic
        self._architecture = check_architecture(
            self.model, config.model.revision, scores=config.trains_reward_model or critic
        )
        samples = any(config.has(stage) for stage in _SAMPLING)
        if samples and not config.resources.generators.gpus:
            check_head_size(self._architecture, self.model)
        config, self._ends = with_ends(config, self.model, self.tokenizer)
        self.config, self.run, self.starts, self.local = config, run, starts, local
        self.data = RunData(config, self.tokenizer)
        check_context(config.data.max_prompt_tokens, config.data.max_response_tokens, context_length(self.model))
        self.workers = Workers(
            config.resources.learner,
            run.address_of(run.checkpoints),
            f"workers-{config.name}",
            local=local,
            announce=self._announce,
            heartbeat_timeout_s=config.resources.heartbeat_timeout_s,
        )
        """The learner's, which serve every training stage."""
        self.rollouts = RolloutClient(config, starts, self.tokenizer, local, self._announce)
        self._own_connection = contextlib.ExitStack()
        self._connection = connection or self._own_connection
        self._tracking = Tracking(config, run)
        self._started = False
        self.plugin = read_plugin(config.rl)
        """The file of an algorithm of the user's own."""
        self.interrupted = False
        """Whether Ctrl-C or SIGTERM came in the last step of a stage, which then finished: the next is not to begin."""
        self.placement: Table | None = None
        """Which actors go to which node; None before the start, and with `--local`."""
        self.remarks: list[str] = []
        """What the config asks for and may not mean; known after the start."""

    def start(self) -> bool:
        """Read the data, connect to Ray (not if local): mistakes in the data show before a cluster starts.

        Returns whether this was the first call; later ones do nothing.
        """
        if self._started:
            return False
        self._check_models()
        self.data.read()
        self._check_room()
        make_algorithm(self.config.rl, self.plugin)  # a mistake in the user's file
        if self.config.data.comparisons is None:
            check_labeller(self.config.collect.labeller)
        if not self.local:
            self._connection.enter_context(connected(self.config))
            self.run.note_in_lock(f"Ray at {ray.get_runtime_context().gcs_address}")
            self.placement = preflight(self.config)
        for line in (*self._choices, *self._ends):
            console.print(line, soft_wrap=True)
        self._own_connection.enter_context(self._tracking)  # of this run, whoever it shares Ray with
        self.remarks = remarks(self.config)
        train = self.data.train
        if train.sft and not self.config.has("sft"):
            console.print(
                f"{len(train.sft)} demonstrations are the share of sft, which this run leaves out; if the model that "
                "it starts from was not trained on them, data.sft_fraction=0 gives them to the other stages",
                soft_wrap=True,
            )
        self._started = True
        return True

    def _check_room(self) -> None:
        """
        Raises:
            UserError: the disk has surely no room for what the run writes.
        """
        done = [stage.name for stage in stages_of(self.config) if self.run.done(stage.name)]
        there = sum(path.stat().st_size for path in self.run.checkpoints.rglob("*") if path.is_file())
        line, close = check_room(self.run.path, needed(self.config, done, *self.parameters, KEPT_CHECKPOINTS), there)
        if close:
            warn(console, f"{line}; make room, lower rl.keep_checkpoints, or put runs_dir on another disk")
        else:
            console.print(line, soft_wrap=True, markup=False)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """How common words are in the run's demonstrations."""
        return Vocabulary.of_demonstrations(self.data.demonstrations)

    @functools.cached_property
    def gold(self) -> Labeller | None:
        """The labeller whose measure is `gold`."""
        return gold_labeller(self.config, self.vocabulary)

    def _check_models(self) -> None:
        """
        Raises:
            UserError: a model that a `from` names cannot take its place in the run.
        """
        scoring: dict[str, Callable[[str, str], None]] = {
            "reward_model.from": functools.partial(check_reward_model, trained=self.config.trains_reward_model),
            "collect.margin_from": functools.partial(check_reward_model, trained=False),
            "rl.value_from": functools.partial(check_reward_model, trained=True),
        }
        for key, model in self.starts.given.items():
            with naming(key):
                scoring.get(key, check_policy)(local_copy(model), self.model)

    def overview(self) -> Table:
        """What the config's batch numbers mean in steps, samples, tokens and memory."""
        splits, published, answers = self.data.train, None, 2.0
        if self.config.data.comparisons is not None:
            each = [len(c.response_ids) for c in self.data.comparisons if not c.heldout]
            published, answers = len(each), sum(each) / max(len(each), 1)
        return batch_table(
            self.config,
            len(splits.sft),
            len(splits.rl),
            published,
            len(self.data.evaluated),
            self.parameters,
            {text.reward.name: text.bytes for text in self.rollouts.texts if text.bytes},
            answers,
            len(self.data.collect),
        )

    def _announce(self, line: str, whole: str) -> None:
        """Tell the user what has happened to an actor; the whole of it goes into the error log."""
        warn(console, line)
        with contextlib.suppress(OSError, UserError):  # a full disk or a store away may be what it is about
            note(self.run, line, whole)

    def rest(self) -> None:
        """Give the actors back while people work, which takes hours or days; the next stage starts them again."""
        if not self.local:
            self.workers.close()
            self.rollouts.close()

    def close(self) -> None:
        """End the actors and the trackers, and the Ray connection if it is this session's own."""
        try:
            self.rollouts.stop_listening()
            self.workers.close()
        finally:  # also at a second Ctrl-C
            self._own_connection.close()
            if ray.is_initialized():  # a connection that others go on using
                self.rollouts.close()

    def checkpoint_name(self, stage: str) -> str:
        """Where a stage's checkpoints go: marked by everything that decides its result, so that a run whose settings
        changed starts the stage anew in place of continuing from weights of other settings."""
        settings = dump_config(self.config)
        relevant = {key: settings[key] for key in ("seed", "model", "data", *stages_to(stage, self.config))}
        if stage != "sft" and self.config.stages is not None:
            relevant["stages"] = settings["stages"]  # which prompts are collected for depends on them
        relevant["from"] = {key: model for key, model in self.starts.given.items() if stage in stages_from(key)}
        contents = stored_contents(self.run)
        relevant["contents"] = {key: hashes(contents, key) for key in contents if stage in stages_from(key)}
        for key in self.config.rl.of_no_result:
            relevant.get("rl", {}).pop(key, None)
        for section in relevant.values():
            if isinstance(section, dict):
                section.pop(MICRO_BATCH, None)
        asked = [relevant["collect"]["labeller"]] if "collect" in relevant else []
        if "rl" in relevant:
            relevant["rewards"] = settings["rewards"]
            asked += relevant["rewards"]
            relevant["plugins"] = [self.plugin, *(text.plugin for text in self.rollouts.texts if text.plugin)]
            if self.rollouts.environment is not None:
                relevant["environment"] = [settings["environment"], self.rollouts.environment.plugin]
        for section, key in itertools.product(asked, HOW_ASKED):
            section.pop(key, None)
        digest = hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"{stage}-{digest}"

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """How many parameters of the policy are frozen, and how many are trained."""
        return parameter_counts(self._architecture, self.config.model.lora)

    # ---- training

    def loop_arguments(self, stage: str) -> dict[str, Any]:
        """What every training loop is told, see `actors.training.loop.LoopArguments`."""
        keep = self.config.rl.keep_checkpoints if stage == "rl" else KEPT_CHECKPOINTS
        return {
            "config": self.config,
            "run_dir": self.run.address,
            "checkpoints": self.checkpoint_name(stage),
            "keep_checkpoints": keep,
            "stop": self.workers.stop_request(),
        }

    def warm_up(self, generators: bool) -> None:
        """Begin to start the learner's workers, and the generators if asked to, while the driver prepares the data."""
        if self.local:  # nothing happens beside anything else in one process, and mistakes are to show first
            return
        self.workers.start()
        if generators:
            self.rollouts.start()

    def train(self, stage: str, loop: TrainingLoop, arguments: LoopArguments) -> None:
        """Run a training loop on the learner's workers and show each of its steps; see `Workers.train` for errors.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the loop has written a checkpoint, unless a second one followed.
        """
        assert arguments.stop is not None
        ask = functools.partial(arguments.stop.submit, "request_stop")
        with asking_first(stage, ask) as stopping, following(self.run, stage, console):
            self.workers.train(loop, arguments)
        self.interrupted = stopping.is_set()
        if self.interrupted and not self.run.done(stage):
            raise KeyboardInterrupt


@contextlib.contextmanager
def opened(config: Config, local: bool = False, connection: contextlib.ExitStack | None = None) -> Iterator[Session]:
    """The run's folder (locked) and a `Session` over it; it connects to Ray when a stage starts (never if `local`).

    Args:
        connection: closes the connection to Ray, so that several runs in turn may share one. None: it is closed with
            the session.

    Raises:
        UserError: the run cannot go on with this config, or a model or run that it names is not there.
    """
    runs_dir = runs_address(config.runs_dir, inside_job())
    # Not as it was typed: `namespace` of the run's actors is made of it, and config.yaml tells `rayrlhf status`.
    config = config.model_copy(update={"runs_dir": runs_dir})
    run = RunFolder(join(runs_dir, config.name))
    if config.rounds is not None:
        raise UserError(
            f"rounds: `rayrlhf run` does them; for one stage of a round take the config of that round, such as "
            f"{join(run.address, round_name(1), run.config.name)}, or set rounds=null"
        )
    check_trackers(config.tracking)
    with run.lock(), contextlib.ExitStack() as own_connection, recorded(run):
        run.download_files()
        if has_rounds(run):
            raise UserError(f"{run.address} is a run in rounds; set rounds, or choose another name (name=OTHER)")
        models = find_models(config)
        contents = read_contents(_recorded(config), models, stored_contents(run))
        model = local_copy(Starts(config, run, models).base)
        config, lengths = with_lengths(config, run, model, contents)
        if asks_for_machines(config) and not local and has_cluster():
            (connection or own_connection).enter_context(connected(config))
        config, resources = with_resources(config, model)
        open_or_create(_recorded(config), runs_dir, contents=contents)
        if config.start is not None:
            console.print(take_over(run, _recorded(config), contents), soft_wrap=True)
        starts = Starts(config, run, models)
        choices = filter(None, (lengths, resources))
        session = Session(_beginning_with(starts, config), run, starts, local, choices, connection)
        try:
            with recorded(run):  # while Ray is there, which knows where its logs are
                yield session
        finally:
            session.close()


def _recorded(config: Config) -> Config:
    """The config as the run's folder has it.

    An evaluation of another file is no part of the run: it neither conflicts with a finished one nor is recorded.
    """
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": None})})


def _beginning_with(starts: Starts, config: Config) -> Config:
    """The config with the model that the run begins with in place of `model.path`, where a `from` names one."""
    if starts.base not in starts.given.values():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": starts.base, "revision": None})})
