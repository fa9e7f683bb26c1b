"""A game: the policy guesses a number and hears whether it is higher or lower. `configs/guess.yaml` plays it."""

from __future__ import annotations

import re

from rayrlhf.environments.base import Turn


class Guess:
    """The reference of the prompt is the number. Reward: 1 for finding it before the turns end."""

    def __init__(self) -> None:
        self.number = 0

    def reset(self, prompt: str, reference: str | None, seed: int) -> None:
        self.number = int(reference or 0)

    def step(self, text: str, token_ids: list[int]) -> Turn:
        found = re.search(r"\d+", text)
        if not found:
            return Turn(done=True)
        guess = int(found.group())
        if guess == self.number:
            return Turn(reward=1.0, done=True)
        return Turn(f" {'Higher' if self.number > guess else 'Lower'}. Guess:")
