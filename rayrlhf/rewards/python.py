"""Rewards by functions in files of your own, called in the scorers.

def brevity(responses):             # any of: prompts, responses, references, metadata, token_ids, and its settings
    return [-len(text) / 100 for text in responses]
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rayrlhf.config_resources import ScorerConfig
from rayrlhf.config_rewards import PythonReward
from rayrlhf.errors import UserError, one_line
from rayrlhf.plugins import Plugin
from rayrlhf.rewards.base import TextReward

TOLD = ("prompts", "responses", "references", "metadata", "token_ids")
"""What a function may ask for by the names of its parameters: a list each, with one entry for each response."""


class Sampled(Protocol):
    """Which response a score is of; a trajectory is one."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def sample_index(self) -> int: ...


class PythonFunction(TextReward):
    """One function and what it is told."""

    reward: PythonReward
    plugin: Plugin

    def __init__(
        self, reward: PythonReward, plugin: Plugin, role: str = "reward", told: tuple[str, ...] = TOLD
    ) -> None:
        """
        Args:
            reward: its section of the config.
            plugin: its file.
            role: what it is to the run, for errors.
            told: the names of `TOLD` that are known of a response.
        """
        self.reward, self.plugin, self.role, self.told = reward, plugin, role, told
        self._function: Callable[..., Any] | None = None
        self._wanted: tuple[str, ...] = ()
        """The names of `TOLD` that it asks for."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the function, which is made of the file's text where it is called."""
        return self.__dict__ | {"_function": None}

    @classmethod
    def read(cls, reward: PythonReward) -> PythonFunction:
        """The function of a reward, read and tried.

        Raises:
            UserError: a file that cannot be read or run, or a function that asks for what nobody knows.
        """
        function = cls(reward, Plugin.read(reward.path, f"rewards: {reward.name}"))
        function.load()
        return function

    @property
    def place(self) -> str:
        return f"{self.role} {self.reward.name!r} ({self.plugin.path}:{self.plugin.name})"

    def load(self) -> Callable[..., Any]:
        """The function.

        Raises:
            UserError: the file cannot be run, has no such function, or the function asks for what nobody knows.
        """
        if self._function is None:
            function = self.plugin.load()
            if not callable(function):
                raise UserError(f"{self.place} is no function")
            known = {*self.told, *self.reward.settings}
            parameters = inspect.signature(function).parameters.values()
            if unknown := [p.name for p in parameters if p.name not in known and p.default is p.empty and _named(p)]:
                raise UserError(
                    f"{self.place} asks for {', '.join(unknown)}; there are {', '.join(self.told)}, and its `settings`"
                )
            taken = {p.name for p in parameters}
            if unused := [key for key in self.reward.settings if key not in taken and not _takes_any(parameters)]:
                raise UserError(f"{self.place} does not take {', '.join(unused)} of its `settings`")
            self._wanted = tuple(name for name in self.told if name in taken or _takes_any(parameters))
            self._function = function
        return self._function

    def start(self, settings: ScorerConfig) -> None:
        self.load()

    def __call__(self, trajectories: Sequence[Sampled], told: Mapping[str, Sequence[Any]]) -> list[float]:
        """A score for each trajectory.

        Raises:
            UserError: the function raised, or its result is not one finite number for each response; the message names
                function, prompt and sample.
        """
        function = self.load()
        try:
            found = _call(function, {name: list(told[name]) for name in self._wanted}, self.reward.settings)
        except Exception as error:
            raise UserError(f"{self.place} raised {self._cause(error)}{self._culprit(trajectories, told)}") from error
        scores = list(found) if hasattr(found, "__iter__") and not isinstance(found, str | bytes) else None
        if scores is None or len(scores) != len(trajectories):
            got = f"{len(scores)} scores" if scores is not None else repr(found)
            raise UserError(f"{self.place} returned {got} for {len(trajectories)} responses; return a list of one each")
        for score, trajectory in zip(scores, trajectories, strict=True):
            if not _is_number(score):
                raise UserError(
                    f"{self.place} returned {score!r} for prompt {trajectory.prompt_id!r}, sample "
                    f"{trajectory.sample_index}; return finite numbers"
                )
        return [float(score) for score in scores]

    def _cause(self, error: Exception) -> str:
        """What went wrong, and the last line of the user's file that was under way."""
        lines, traceback = [], error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == self.plugin.path:
                lines.append(traceback.tb_lineno)
            traceback = traceback.tb_next
        return f"{type(error).__name__}: {one_line(error)}" + (f" (line {lines[-1]})" if lines else "")

    def _culprit(self, trajectories: Sequence[Sampled], told: Mapping[str, Sequence[Any]]) -> str:
        """The first response that it also raises for when it is alone."""
        function = self.load()
        for i, trajectory in enumerate(trajectories):
            try:
                _call(function, {name: [told[name][i]] for name in self._wanted}, self.reward.settings)
            except Exception:
                return f", for prompt {trajectory.prompt_id!r}, sample {trajectory.sample_index}"
        return ""


def _call(function: Callable[..., Any], told: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    result = function(**{**told, **settings})
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _is_number(score: Any) -> bool:
    try:
        return math.isfinite(float(score)) and not isinstance(score, str)
    except (TypeError, ValueError):
        return False


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
