"""Which prompts people are asked about first: those on whose best answer a reward model is least sure.

By the model of Bradley and Terry, sigmoid(margin) is the probability that the answer with the higher score is better.
So the smaller the margin of the best two answers, the more a verdict on them tells: margin sampling (Scheffer, Decomain
& Wrobel 2001). Christiano et al. 2017 (section 2.2.4) took the disagreement of an ensemble of reward models in its
place, and found that it helps in some tasks and harms in others.
"""

from __future__ import annotations

from collections.abc import Sequence


def margin(scores: Sequence[float]) -> float:
    """The difference of the two highest of at least two scores."""
    best, second = sorted(scores, reverse=True)[:2]
    return best - second


def closest_first(scores: Sequence[Sequence[float]]) -> list[int]:
    """The places of the prompts with these scores of their answers, by rising margin; equal ones stay in order."""
    return sorted(range(len(scores)), key=lambda place: margin(scores[place]))
