"""The driver's line to the run's coordinator: weights go out, responses and their scores come back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import PreTrainedTokenizerBase

from actors.pools.monitoring import CONTROL
from actors.pools.remote import ActorDied, Call, Remote, namespace, wait
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.coordinator_link import CoordinatorLink, Setup
from actors.rollouts.weight_sync import publish_directory
from jobs.console import warn_of_stage
from jobs.listener import Announce, Listener
from jobs.stopping import asking_first
from rayrlhf.config import Config
from rayrlhf.data.prompts import EncodedPrompt, requests_for
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import sampling_of
from rayrlhf.environments.base import EnvironmentMaker
from rayrlhf.models.hub import local_directory
from rayrlhf.reports.alarms import cut_prompts
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.rewards.judge import UNUSABLE
from rayrlhf.rewards.labeller import Labeller
from rayrlhf.rewards.pretrained import CUT
from rayrlhf.rewards.texts import TextRewards, make_text_rewards
from rayrlhf.runs.samples import KeptSamples
from rayrlhf.runs.starts import Starts
from rayrlhf.runs.storage import local_copy
from rayrlhf.sections import DrawConfig
from rayrlhf.terminal import say
from rayrlhf.trajectory import Sampling, Trajectory

T = TypeVar("T")
SLICE = 1024
"""Responses that one generator or scorer is asked for at a time, outside `rl`."""
KEPT_GROWTH = 1.25
"""Samples are kept again once there are so many times more: a kill costs a fifth of them, or one slice."""


class RolloutClient:
    """The coordinator of one run, and what the stages ask of it. It starts when it is first needed."""

    def __init__(
        self,
        config: Config,
        starts: Starts,
        tokenizer: PreTrainedTokenizerBase,
        local: bool,
        announce: Announce = lambda line, whole: None,
    ) -> None:
        """Generators start with the base of `starts`, and scorers have its reward model.

        Args:
            announce: gets what the coordinator has to tell the user.
        """
        self.config, self.starts, self.tokenizer, self.local = config, starts, tokenizer, local
        self._announce = announce
        self._listener: Listener | None = None
        self._warned_of: set[str] = set()
        """Rewards whose model has read responses without the beginning of their prompts."""
        self.texts = make_text_rewards(config.rewards)
        """The rewards that read texts."""
        self.sampling(config.rl.draw)  # a stop token that is none shows before anything starts
        self.environment = EnvironmentMaker.read(config.environment)
        self._model = Path()
        """The directory whose weights the generators were given last."""
        self._link: CoordinatorLink | None = None
        self._starting: Call | None = None

    def start(self) -> CoordinatorLink:
        """Begin to start the coordinator and its generators, unless they are up; returns a line to it at once."""
        if self._link is None:
            data = self.config.data
            coordinator = Remote.spawn(
                "coordinator",
                Coordinator,
                self.config,
                self.starts.base,
                data.max_prompt_tokens + data.max_response_tokens,
                self.tokenizer.pad_token_id,
                self.local,
                self.environment,
                local=self.local,
                options={} if self.local else _options(self.config),
                concurrency_groups={CONTROL: 1},
            )
            self._link = CoordinatorLink(coordinator, Setup({"start_generators": ()}), self.config)
            self._starting = coordinator.submit("start_generators")
            self._listener = None if self.local else Listener(coordinator, self._announce)
        return self._link

    def close(self) -> None:
        """End the coordinator, and with it generators and scorers, which it owns. `start` starts another one."""
        self.stop_listening()
        if self._link is not None:
            self._link.remote.kill()
        self._link, self._starting = None, None

    def stop_listening(self) -> None:
        """Hear the last of the coordinator, before Ray ends."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def wait_for_generators(self) -> None:
        """Return when the generators are ready.

        Raises:
            ActorFailure: one is not ready in time; the message names it.
        """
        link = self.start()
        starting, self._starting = self._starting, None
        if starting is None:
            return
        try:
            wait([starting], self.config.resources.coordinator_timeout_s)
        except ActorDied as death:
            link.replace(death)

    def sampling(self, draw: DrawConfig, *, play: bool = False) -> Sampling:
        """Responses of the run's lengths, drawn as `draw` says; to `play` is to take turns with its environment."""
        turns = self.config.environment.max_turns if play and self.config.environment else 1
        return sampling_of(self.tokenizer, self.config.data, draw, turns)

    def load_weights(self, model: str) -> int:
        """Put the weights of a model (a directory, URI or hub name) on all generators; returns their version."""
        self.wait_for_generators()
        self._model = Path(local_directory(local_copy(model)))
        link = self.start()
        link.setup.version = link.send_weights(partial(publish_directory, self._model, local=self.local))
        return link.setup.version

    def generate(
        self,
        prompts: list[EncodedPrompt],
        draw: DrawConfig,
        version: int,
        *seed_parts: int | str,
        samples: int = 1,
        play: bool = False,
    ) -> list[Trajectory]:
        """`samples` responses to each prompt, in order, from the weights of `version`; the rest as in `sampling`.

        They are kept until the stage is done. `version` is that of the weights that were loaded last.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished is kept, unless a second one followed.
        """
        requests = requests_for(prompts, samples, self.config.seed, *seed_parts)
        sampling, link = self.sampling(draw, play=play), self.start()
        played = [self.environment.config.model_dump(), self.environment.plugin] if play and self.environment else None
        kept = KeptSamples(self.starts.run, self._model, requests, sampling, played)
        done = kept.read(version)
        if done:
            say(f"{len(done)} of {len(requests)} samples are there from an earlier start")
        missing, written = [place for place in range(len(requests)) if place not in done], len(done)

        def stop() -> None:
            # First: a coordinator that has just died would not hear it. As a whole: this is another thread.
            link.setup.calls = {**link.setup.calls, "stop_drawing": ()}
            link.remote.submit_beside(CONTROL, "stop_drawing")

        try:
            with asking_first(str(seed_parts[0]), stop, "keeps the samples that are finished") as stopping:
                for piece in self._slices(missing, self.config.resources.generators.count, "sampled"):
                    found = link.call("draw", [requests[place] for place in piece], sampling, version)
                    done |= {place: t for place, t in zip(piece, found, strict=True) if t is not None}
                    if stopping.is_set():
                        break
                    # A kill may come at any moment. The file is written as a whole, so only when it has grown enough.
                    if len(done) > KEPT_GROWTH * written:
                        kept.write(done)
                        written = len(done)
        finally:  # also where a generator has failed for good
            if missing and done:
                kept.write(done)
        if stopping.is_set():
            raise KeyboardInterrupt
        return [done[place] for place in range(len(requests))]

    def start_scorers(
        self, prompts: list[Prompt], reference: str, gold: Labeller | None, reward_model: str | None = None
    ) -> None:
        """Scorers of responses to these prompts, with the rewards of the config.

        Args:
            prompts: with their references, for rewards that look at these.
            reference: the reference policy: a directory, URI or hub name.
            gold: they watch the texts as well, and have this labeller's measure of them; None: they do not.
            reward_model: in place of the run's own, and of the rewards that read texts, which may cost money.
        """
        measure = None if gold is None else GoldMeasure(gold, prompts, self.tokenizer)
        texts = TextRewards(self.texts, prompts, self.tokenizer) if self.texts and reward_model is None else None
        self.start().tell("start_scorers", reward_model or self.starts.reward_model, reference, measure, texts)

    def score(self, trajectories: list[Trajectory], temperature: float) -> list[Trajectory]:
        """The trajectories with rewards and reference log-probs, in order; only the stage `evaluate` asks for it."""
        done: list[Trajectory] = []
        for piece in self._slices(trajectories, self.config.resources.scorers.count, "scored"):
            done += self.start().call("score", piece, temperature)
        for text in self.texts:
            cut = sum(t.counted.get(CUT + text.reward.name, 0) for t in done)
            if cut and text.reward.name not in self._warned_of:  # the other models' answers are to the same prompts
                self._warned_of.add(text.reward.name)
                warn_of_stage(self.starts.run, "evaluate", cut_prompts(text.reward.name, cut, len(done)))
        if unusable := sum(t.counted.get(UNUSABLE, 0) for t in done):
            warn_of_stage(
                self.starts.run, "evaluate", f"{unusable} question(s) to judges got no usable reply and count as 0"
            )
        return done

    def _slices(self, work: list[T], actors: int, done: str) -> Iterator[list[T]]:
        """Pieces that one time-out may bound whatever the amount of work; long work says how far it is."""
        size = SLICE * actors
        for start in range(0, len(work), size):
            if start:
                say(f"{done} {start} of {len(work)}")
            yield work[start : start + size]


def _options(config: Config) -> dict[str, Any]:
    """Ray's options for the coordinator. It is on the driver's node, which is not one that may vanish, and outside the
    placement group of a Tune trial. Ray starts it again as often as it dies, see `CoordinatorLink`."""
    node = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "namespace": namespace(config),
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        "max_restarts": -1,
    }
