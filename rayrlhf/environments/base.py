"""The interface of an environment, and how one is made of the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from rayrlhf.config_environment import EnvironmentConfig
from rayrlhf.errors import UserError, one_line
from rayrlhf.plugins import Plugin


class Turn(NamedTuple):
    """An environment's answer to what the policy has written."""

    observation: str | Sequence[int] = ""
    """What the policy reads before its next turn: a text, which is tokenised once, or token ids."""
    reward: float = 0.0
    """Added to the trajectory's reward."""
    done: bool = False
    """Whether the trajectory ends here; the observation is not read then."""


class Environment(Protocol):
    """One object for each trajectory, made with the `settings` of the config as keyword arguments."""

    def reset(self, prompt: str, reference: str | None, seed: int) -> None:
        """A trajectory begins.

        Args:
            prompt: what the policy is to read first.
            reference: of the prompt, if the data has one.
            seed: of this sample, the same when the run is repeated.
        """

    def step(self, text: str, token_ids: list[int]) -> Turn:
        """Answer a turn of the policy; called by one thread of several.

        Args:
            text: what the policy wrote in this turn, without special tokens.
            token_ids: the same as it was sampled, with the EOS that ended it.
        """


class EnvironmentMaker:
    """The class that the config names; it is loaded where it is first needed."""

    def __init__(self, config: EnvironmentConfig, plugin: Plugin) -> None:
        self.config, self.plugin = config, plugin
        self._kind: Callable[..., Environment] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the class, which is made of the file's text where it is used."""
        return self.__dict__ | {"_kind": None}

    @classmethod
    def read(cls, config: EnvironmentConfig | None) -> EnvironmentMaker | None:
        """Of the section `environment`, if there is one; tried, so that mistakes show before anything starts.

        Raises:
            UserError: the file cannot be read or run, or the class lacks a method or refuses the settings.
        """
        if config is None:
            return None
        maker = cls(config, Plugin.read(config.path, "environment"))
        made = maker()
        for method in ("reset", "step"):
            if not callable(getattr(made, method, None)):
                raise UserError(f"{maker.place} has no method {method}; docs/extending.md shows one")
        return maker

    @property
    def place(self) -> str:
        return f"environment {self.plugin.path}:{self.plugin.name}"

    def __call__(self) -> Environment:
        """A new environment, for one trajectory.

        Raises:
            UserError: the file cannot be run, or its class cannot be made with the settings.
        """
        if self._kind is None:  # once: the file runs again with every load
            self._kind = self.plugin.load()
        assert self._kind is not None
        try:
            return self._kind(**self.config.settings)
        except Exception as error:
            raise UserError(f"{self.place} cannot be made: {type(error).__name__}: {one_line(error)}") from error
