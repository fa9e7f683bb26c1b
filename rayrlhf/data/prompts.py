"""The prompts that a RL step uses, and the samples that are drawn for them.

Both are pure functions of (seed, step): a run that continues at step 17 asks for the same samples as one that never
stopped, and a checkpoint needs no state of a data loader.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrlhf.trajectory import GenerationRequest, derive_seed


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids."""

    id: str
    ids: tuple[int, ...]
    text: str = ""
    """Text and reference, where an environment is to know them."""
    reference: str | None = None


def prompts_of_step(count: int, seed: int, step: int, per_step: int, skip: int = 0) -> list[int]:
    """Indices of the `per_step` prompts of `step`, counted from 0.

    Steps are consecutive slices of permutations, one permutation for each pass over the `count` prompts.
    Example with 5 prompts, 2 a step: permutations 3 1 4 0 2 | 2 0 1 3 4 give [3, 1], [4, 0], [2, 2], [0, 1], [3, 4].
    The third step takes prompt 2 twice, since one pass ends and the next one begins inside it.
    With `skip`, the first step begins behind so many prompts of the permutations: with 3, at 0 in the example.
    """
    orders: dict[int, np.ndarray] = {}
    chosen = []
    # All steps together are one line of positions, of which every `count` are a pass over the prompts.
    for position in range(skip + step * per_step, skip + (step + 1) * per_step):
        epoch, offset = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(seed, "prompts", epoch)).permutation(count)
        chosen.append(int(orders[epoch][offset]))
    return chosen


def whose_turn(shares: Sequence[float], count: int) -> list[int]:
    """Which of several models draws each of `count` answers: indices of `shares`.

    After any number of answers, each model has drawn its share of them, but for rounding: the next one is always that
    which lacks most. The shares 2, 1 and 1 give 0, 1, 2, 0 and again 0, 1, 2, 0.
    """
    total, drawn = sum(shares), [0] * len(shares)
    turns = []
    for done in range(1, count + 1):
        lacking = [share / total * done - had for share, had in zip(shares, drawn, strict=True)]
        turns.append(lacking.index(max(lacking)))
        drawn[turns[-1]] += 1
    return turns


@functools.lru_cache(maxsize=16)  # each of a step's groups asks for it, and it orders all prompts
def replacements_of_step(
    count: int, seed: int, step: int, per_step: int, redraw: int, skip: int = 0
) -> tuple[int, ...]:
    """Indices of prompts that may take the places of those of `step`, at their `redraw`-th redraw, counted from 1.

    No prompt comes twice in a step, whatever the number of redraws: the list is shorter than `per_step`, or empty,
    where there are no further prompts.
    """
    used = set(prompts_of_step(count, seed, step, per_step, skip))
    order = np.random.default_rng(derive_seed(seed, "redraw", step)).permutation(count).tolist()
    others = [index for index in order if index not in used]
    return tuple(others[(redraw - 1) * per_step : redraw * per_step])


def requests_for(prompts: Sequence[EncodedPrompt], samples: int, *seed_parts: int | str) -> list[GenerationRequest]:
    """Make `samples` requests for each prompt, in order.

    A request's seed derives from `seed_parts`, the prompt's id and the sample's index, so it does not matter which
    generator draws it. A prompt may come twice, where one pass over the data ends inside a step and the next begins.
    Its second turn goes on counting the index, so that its samples differ from those of the first.
    """
    drawn: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        for index in range(drawn[prompt.id], drawn[prompt.id] + samples):
            seed = derive_seed(*seed_parts, prompt.id, index)
            requests.append(GenerationRequest(prompt.id, prompt.ids, index, seed, prompt.text, prompt.reference))
        drawn[prompt.id] += samples
    return requests
