"""Which prompts a PPO step uses: a pure function of (seed, step), so nothing about it has to be saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrlhf.trajectory import GenerationRequest, derive_seed


@dataclass(frozen=True)
class EncodedPrompt:
    id: str
    ids: tuple[int, ...]


def prompts_of_step(count: int, seed: int, step: int, per_step: int) -> list[int]:
    """Indices of the `per_step` prompts of `step`: consecutive slices of a fresh permutation per pass over the data."""
    orders: dict[int, np.ndarray] = {}
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, offset = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(seed, "prompts", epoch)).permutation(count)
        chosen.append(int(orders[epoch][offset]))
    return chosen


def requests_for(prompts: Sequence[EncodedPrompt], samples: int, *seed_parts: int | str) -> list[GenerationRequest]:
    """`samples` requests per prompt; each one's seed derives from `seed_parts`, the prompt and the sample's index.

    A prompt that comes again (where two passes over the data meet in one step) goes on counting its samples.
    """
    drawn: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        for index in range(drawn[prompt.id], drawn[prompt.id] + samples):
            seed = derive_seed(*seed_parts, prompt.id, index)
            requests.append(GenerationRequest(prompt.id, prompt.ids, index, seed))
        drawn[prompt.id] += samples
    return requests
