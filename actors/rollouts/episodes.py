"""Responses in turns: an engine that samples, an environment that answers, one trajectory of both.

    engine        turn 1 of A, B, C ...      turn 2 of B ...      turn 2 of A, C ...
    environment              answers A, B, C, in threads, while the engine goes on with the others

The trajectory's token ids are those that were sampled and those that an observation was tokenised to, once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rayrlhf.data.tokens import continue_texts, decode_response
from rayrlhf.environments.base import Environment, EnvironmentMaker, Turn
from rayrlhf.errors import UserError, one_line
from rayrlhf.trajectory import FinishReason, GenerationRequest, Sampling, Trajectory, derive_seed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

POLL_S = 0.2
"""How often late answers are looked for while the engine has nothing to do."""


class Rollout(Protocol):
    """What a generator asks for responses: `Engine`, or `Episodes` around it. See `Engine` for the methods."""

    @property
    def in_flight(self) -> int: ...
    def add(self, requests: Mapping[int, GenerationRequest], sampling: Sampling, version: int) -> None: ...
    def step(self) -> dict[int, Trajectory]: ...
    def abort(self) -> None: ...
    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...


@dataclass
class Episode:
    """A trajectory that is not finished: what the policy and the environment have written so far."""

    request: GenerationRequest
    sampling: Sampling
    environment: Environment
    ids: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    """For each of `ids` whether the policy wrote it; the next two have an entry for each that it wrote."""
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turns: int = 0
    reward: float = 0.0
    answering_since: float | None = None
    """Since when the environment works on an answer."""

    def take(self, turn: Trajectory) -> None:
        """Append a turn of the policy."""
        self.ids += turn.response_ids.tolist()
        self.written += [True] * len(turn.response_ids)
        self.logprobs += turn.generator_logprobs.tolist()
        self.versions += turn.versions.tolist()
        self.turns += 1

    def observe(self, ids: Sequence[int]) -> None:
        """Append what the environment says."""
        self.ids += ids
        self.written += [False] * len(ids)

    @property
    def room(self) -> int:
        """Tokens that may follow."""
        return self.sampling.max_tokens - len(self.ids)

    def next_turn(self) -> tuple[GenerationRequest, Sampling]:
        """What the engine is asked for next: the same trajectory goes on, with a seed of this turn."""
        request = self.request
        ids, seed = (*request.prompt_ids, *self.ids), derive_seed(request.seed, "turn", self.turns)
        return replace(request, prompt_ids=ids, seed=seed), replace(self.sampling, max_tokens=self.room)

    def finished(self, reason: FinishReason) -> Trajectory:
        request = self.request
        return Trajectory(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            prompt_ids=np.asarray(request.prompt_ids, np.int64),
            response_ids=np.asarray(self.ids, np.int64),
            generator_logprobs=np.asarray(self.logprobs, np.float32),
            versions=np.asarray(self.versions, np.int64),
            finish_reason=reason,
            written=np.asarray(self.written, np.bool_),
            turns=self.turns,
            environment_reward=self.reward,
            minimum=self.sampling.minimum,
        )


class Episodes:
    """An engine with an environment. Requests whose `sampling.max_turns` is 1 go past the environment."""

    def __init__(self, engine: Rollout, maker: EnvironmentMaker, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self.maker, self.tokenizer = engine, maker, tokenizer
        self.version = 0
        """Of the weights that the engine holds."""
        self._episodes: dict[int, Episode] = {}
        """By ticket."""
        self._answers: dict[Future[Turn], int] = {}
        """Answers that the environment works on, and their tickets."""
        self._threads = ThreadPoolExecutor(maker.config.threads, thread_name_prefix="environment")

    @property
    def in_flight(self) -> int:
        """Responses that are not finished, at the engine or at the environment."""
        return self.engine.in_flight + len(self._answers)

    def add(self, requests: Mapping[int, GenerationRequest], sampling: Sampling, version: int) -> None:
        """See `Engine.add`."""
        self.version = version
        self.engine.add(requests, sampling, version)
        if sampling.max_turns > 1:
            self._episodes |= {ticket: Episode(request, sampling, self.maker()) for ticket, request in requests.items()}

    def step(self) -> dict[int, Trajectory]:
        """Sample one token for every running turn, and take in answers; returns what this finished, by ticket.

        Raises:
            UserError: the environment raised, answered with something else than a turn, or not in time.
        """
        done = {}
        if self.engine.in_flight:
            for ticket, turn in self.engine.step().items():
                finished = self._after_turn(ticket, turn)
                if finished:
                    done[ticket] = finished
        # Where only answers are missing there is nothing else to do.
        idle = not done and not self.engine.in_flight
        for answer in wait(self._answers, POLL_S if idle else 0, FIRST_COMPLETED).done:
            ticket = self._answers.pop(answer)
            finished = self._after_answer(ticket, answer)
            if finished:
                done[ticket] = finished
        self._find_late_answers()
        return done

    def abort(self) -> None:
        """Drop all requests in flight. What the environment still works on is not waited for."""
        self.engine.abort()
        for answer in self._answers:
            answer.cancel()
        self._answers, self._episodes = {}, {}

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `Engine.load_weights`; turns that begin later are stamped with `version`."""
        self.engine.load_weights(tensors, version)
        self.version = version

    def _after_turn(self, ticket: int, turn: Trajectory) -> Trajectory | None:
        """The response, if it ends with this turn of the policy."""
        episode = self._episodes.get(ticket)
        if episode is None:
            return turn
        episode.take(turn)
        if turn.finish_reason == "length":  # cut in the middle of a turn, which nobody can answer
            return self._episodes.pop(ticket).finished("length")
        self._answers[self._threads.submit(self._answer, episode, turn.response_ids.tolist())] = ticket
        return None

    def _answer(self, episode: Episode, ids: list[int]) -> Turn:
        """The environment's answer to a turn of the policy; in a thread of its own."""
        episode.answering_since = time.monotonic()
        request = episode.request
        try:
            if episode.turns == 1:
                episode.environment.reset(request.prompt, request.reference, request.seed)
            answer = Turn(*episode.environment.step(decode_response(self.tokenizer, ids), ids))
            if not math.isfinite(answer.reward):
                raise ValueError(f"its reward is {answer.reward}")
        except Exception as error:
            raise UserError(f"{self._place(episode)}: {type(error).__name__}: {one_line(error)}") from error
        finally:
            episode.answering_since = None
        return answer

    def _after_answer(self, ticket: int, answer: Future[Turn]) -> Trajectory | None:
        """The response, if it ends here. Otherwise the engine goes on with it."""
        episode = self._episodes[ticket]
        turn = answer.result()
        episode.reward += float(turn.reward)
        if turn.done or episode.turns >= episode.sampling.max_turns:
            return self._episodes.pop(ticket).finished("eos")
        observation = self._token_ids(turn.observation, behind=episode.ids[-1])
        if episode.room <= len(observation):
            return self._episodes.pop(ticket).finished("length")
        episode.observe(observation)
        request, sampling = episode.next_turn()
        self.engine.add({ticket: request}, sampling, self.version)
        return None

    def _token_ids(self, observation: str | Sequence[int], behind: int) -> list[int]:
        """The ids of an observation, where it stands: behind the token that ended the policy's turn."""
        if not isinstance(observation, str):
            return [int(token) for token in observation]
        end = str(self.tokenizer.decode([behind]))
        return continue_texts(self.tokenizer, [end], [observation])[0]

    def _find_late_answers(self) -> None:
        limit, now = self.maker.config.step_timeout_s, time.monotonic()
        for ticket in self._answers.values():
            since = self._episodes[ticket].answering_since
            if since is not None and now - since > limit:
                raise UserError(f"{self._place(self._episodes[ticket])}: no answer for {limit} s (step_timeout_s)")

    def _place(self, episode: Episode) -> str:
        request = episode.request
        return f"{self.maker.place}, prompt {request.prompt_id!r}, sample {request.sample_index}, turn {episode.turns}"
