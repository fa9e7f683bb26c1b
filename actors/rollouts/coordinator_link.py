"""Calls to a coordinator that may die: Ray starts another one, and the caller who finds that out tells it all.

    coordinator dies ─▶ Ray ends its generators and scorers, and starts a coordinator that knows nothing (max_restarts)
    a call fails     ─▶ take_over: the setup, which prompts were taken, the weights ─▶ the call once more

That caller is the driver, or the learner's rank 0 while a training loop runs. `max_restarts` is set in
jobs/rollouts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from actors.pools.remote import ActorDied, Call, CouldNotStart, Remote, put, wait
from actors.rollouts.groups import Cursor
from actors.rollouts.weight_sync import PublishedWeights
from rayrlhf.config import Config

_DEATHS = 3
"""The run ends at this many deaths in a row with no call answered in between."""


@dataclass
class Setup:
    """What the driver has told the coordinator, and what another one has to be told in its place."""

    calls: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """By method the arguments it was told last, each of them `put`. Methods are in the order of their first calls."""
    version: int = 0
    """Of the weights that the driver sent last: versions go on from it."""


class CoordinatorLink:
    """Someone's line to the coordinator, which holds beyond the coordinator's death. It is used by one thread."""

    def __init__(self, remote: Remote, setup: Setup, config: Config) -> None:
        self.remote, self.setup = remote, setup
        self.cursor = Cursor(config.rl.steps)
        """Which prompts earlier batches have taken. It begins as all of them: right where nobody asks for a batch."""
        self._timeout_s, self._start_timeout_s = (
            config.resources.coordinator_timeout_s,
            config.resources.start_timeout_s,
        )
        self._publish: Callable[[], PublishedWeights] | None = None
        """Publishes the weights once more that the generators have, under the same version; None if they have none."""
        self._loading: list[Call] = []
        self._deaths = 0

    def call(self, method: str, *args: Any) -> Any:
        """Have the coordinator do something, and wait for it; another one does it if this one dies.

        Raises:
            ActorDied: they die again and again.
            ActorFailure, UserError: what `actors.pools.remote.wait` raises.
        """
        while True:
            try:
                result = self.call_once(method, *args)
            except ActorDied as death:
                self.replace(death)
            else:
                self.forget_deaths()
                return result

    def call_once(self, method: str, *args: Any) -> Any:
        """As `call`, but a death is raised. What went wrong in loading the weights is raised here, too."""
        # In this order: the coordinator answers the last call after the others.
        result = wait([*self._loading, self.remote.submit(method, *args)], self._timeout_s)[-1]
        self._loading = []
        return result

    def forget_deaths(self) -> None:
        """Work was done: earlier deaths do not count any more."""
        self._deaths = 0

    def tell(self, method: str, *args: Any) -> None:
        """A call that belongs to the setup of a coordinator. Large arguments travel once, however many are told."""
        stored = tuple(put(argument, self.remote.local) for argument in args)
        self.call(method, *stored)
        self.setup.calls[method] = stored

    def send_weights(self, publish: Callable[[int], PublishedWeights], after: int = 0) -> int:
        """Send weights to all generators under a new version, above `after`, which is returned.

        Returns once they are copied, not once they are loaded: the next call waits for that.

        Args:
            publish: publishes the weights under a version. It may be called again, for the generators of another
                coordinator, until newer weights are sent.
        """
        self._publish = None  # another coordinator need not load those before
        version = int(self.call("next_version", after))
        self._loading = [self.remote.submit("load_weights", publish(version))]
        self._publish = partial(publish, version)
        return version

    def replace(self, death: ActorDied) -> None:
        """Tell the coordinator that takes the place of a dead one what it has to know; returns when it can go on.

        Raises:
            ActorDied: that one has died, too, and it was the last attempt.
            ActorFailure: a generator or a scorer did not start.
        """
        self._loading = []
        while True:
            self._deaths += 1
            if isinstance(death, CouldNotStart):
                raise death
            if self._deaths == _DEATHS:
                raise ActorDied(f"{death}; {_DEATHS} coordinators in a row died before they did any work") from death
            try:
                self.remote.wait_until_back(self._start_timeout_s)
                publication = self._publish() if self._publish else None
                arguments = (str(death), self.setup, self.cursor, publication)
                self.remote.call("take_over", *arguments, timeout_s=self._timeout_s)
                return
            except ActorDied as another:
                death = another
