"""The record that travels through PPO: one prompt, one sampled response, and what was measured of it.

Token ids are carried end to end; text is never tokenised a second time.
Shapes: P prompt tokens, R response tokens (R >= 1; the EOS, when sampled, is the last of them).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One sample to draw. `seed` alone decides it, given the weights and the sampling settings."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    sample_index: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: plain temperature sampling (top-p 1, top-k off), cut after the first EOS."""

    temperature: float
    max_tokens: int
    eos_token_id: int


@dataclass
class Trajectory:
    """A prompt, its sampled response, and what generator and scorer measured of it."""

    prompt_id: str
    sample_index: int
    seed: int
    prompt_ids: NDArray[np.int64]
    """[P]"""
    response_ids: NDArray[np.int64]
    """[R]"""
    generator_logprobs: NDArray[np.float32]
    """[R] log-probs (nats) of the sampled tokens at the sampling temperature, as the generator saw them."""
    versions: NDArray[np.int64]
    """[R] weight version that produced each token."""
    finish_reason: FinishReason
    rewards: dict[str, float] = field(default_factory=dict)
    """Scores by name, of the whole response."""
    ref_logprobs: NDArray[np.float32] | None = None
    """[R] log-probs of the same tokens under the reference policy at the same temperature."""
    gold: float | None = None
    """The labeller's own measure of the response, where it has one: watched, never trained on."""

    @property
    def length(self) -> int:
        """P + R, the tokens that a forward pass over this trajectory costs."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """[P + R] prompt, then response."""
        return np.concatenate([self.prompt_ids, self.response_ids])


def derive_seed(*parts: int | str) -> int:
    """A 31-bit seed from the run's seed and whatever identifies the sample; the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF
