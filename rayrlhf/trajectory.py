"""The record that travels through PPO: one prompt, one sampled response, and what was measured of it.

Token ids are carried end to end; text is never tokenised a second time.
Shapes: P prompt tokens, R response tokens (R >= 1; the EOS, when sampled, is the last of them).
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Arrays travel as one string of bytes: as objects of their own they make up most of what a message costs."""
        arrays = (
            self.prompt_ids.astype(np.int32),
            self.response_ids.astype(np.int32),
            self.versions.astype(np.int64),
            self.generator_logprobs.astype(np.float32),
            *(() if self.ref_logprobs is None else (self.ref_logprobs.astype(np.float32),)),
        )
        packed = b"".join([array.tobytes() for array in arrays])
        about = (self.prompt_id, self.sample_index, self.seed, self.finish_reason, self.rewards, self.gold)
        return _unpacked, (packed, len(self.prompt_ids), len(self.response_ids), *about)


def _unpacked(
    packed: bytes,
    prompt: int,
    response: int,
    prompt_id: str,
    sample_index: int,
    seed: int,
    finish_reason: FinishReason,
    rewards: dict[str, float],
    gold: float | None,
) -> Trajectory:
    ids = np.frombuffer(packed, np.int32, prompt + response).astype(np.int64)
    start = 4 * (prompt + response)
    versions = np.frombuffer(packed, np.int64, response, start).copy()
    logprobs = np.frombuffer(packed, np.float32, offset=start + 8 * response).copy()
    return Trajectory(
        prompt_id=prompt_id,
        sample_index=sample_index,
        seed=seed,
        prompt_ids=ids[:prompt],
        response_ids=ids[prompt:],
        generator_logprobs=logprobs[:response],
        versions=versions,
        finish_reason=finish_reason,
        rewards=rewards,
        ref_logprobs=logprobs[response:] if len(logprobs) > response else None,
        gold=gold,
    )


class SerializedTrajectory(NamedTuple):
    """A trajectory on its way through the coordinator, which reads these few figures and hands `data` on unread."""

    sample_index: int
    length: int
    """P + R"""
    response_tokens: int
    """R"""
    oldest: int
    """Weight version of its oldest token."""
    newest: int
    version_sum: int
    """Of the versions of all its tokens."""
    gold: float | None
    data: bytes
    """The pickled trajectory."""

    @classmethod
    def of(cls, t: Trajectory) -> SerializedTrajectory:
        versions = t.versions.tolist()
        return cls(
            t.sample_index,
            t.length,
            len(versions),
            min(versions),
            max(versions),
            sum(versions),
            t.gold,
            pickle.dumps(t, protocol=5),
        )

    def load(self) -> Trajectory:
        trajectory: Trajectory = pickle.loads(self.data)
        return trajectory


def derive_seed(*parts: int | str) -> int:
    """A 31-bit seed from the run's seed and whatever identifies the sample; the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF
