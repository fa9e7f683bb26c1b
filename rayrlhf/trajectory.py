"""The record that travels through a step of RL: one prompt, one sampled response, and the measures of it.

Token ids travel from end to end; text is never tokenised a second time.
Shapes: P prompt tokens, R >= 1 response tokens, W of them written by the policy. If an EOS was sampled, it is the last
response token, or the last one of a turn.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One sample to draw. Weights and sampling settings given, `seed` alone decides the outcome."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    sample_index: int = 0
    seed: int = 0
    prompt: str = ""
    """The prompt's text and its reference, for an environment; empty and None in a run without one."""
    reference: str | None = None


class Minimum(NamedTuple):
    """The shortest turn of a policy: its first `tokens` tokens are drawn from the softmax without `ends`."""

    tokens: int
    ends: tuple[int, ...]
    """The tokens that end a turn: EOS and stop tokens."""

    def holds(self, written: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[W] whether the ends were left out when each of these tokens was drawn.

        Only an end is followed by another turn, so a trajectory's turns begin behind the ends that stand in it.

        Args:
            written: [W] all tokens of a trajectory that the policy wrote, in their order.
        """
        places = np.arange(len(written))
        ended = np.isin(written, self.ends)
        begin = np.maximum.accumulate(np.where(np.append(False, ended[:-1]), places, 0))
        return places - begin < self.tokens


class Truncation(NamedTuple):
    """Which tokens may be drawn at all. The names and values are vLLM's, the default is the whole softmax.

    Nothing may be learnt from the log-probs of a truncated distribution, see `rayrlhf.sections.DrawConfig`.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


WHOLE = Truncation()


@dataclass(frozen=True)
class Sampling:
    """How to draw responses: at a temperature, up to the first EOS or stop token."""

    temperature: float
    max_tokens: int
    """Of a whole response, in all its turns."""
    eos_token_id: int
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a response, as the EOS does."""
    max_turns: int = 1
    """How often the policy writes at most; above 1 the run's environment answers in between."""
    min_tokens: int = 0
    """Of each turn, before the token that ends it."""
    truncation: Truncation = WHOLE

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a turn, rising."""
        return tuple(sorted({self.eos_token_id, *self.stop_token_ids}))

    @property
    def minimum(self) -> Minimum | None:
        """None if a turn may end at once."""
        return Minimum(self.min_tokens, self.ends) if self.min_tokens else None


class Wording(NamedTuple):
    """An answer's words, as far as `rayrlhf.rewards.diversity` compares answers by them."""

    repetition: float
    """The share of its 4-grams that it has had before."""
    bigrams: bytes
    """uint32 hashes of its 2-grams."""
    opening: int
    """A hash of its first four words."""


@dataclass
class Trajectory:
    """A prompt, its sampled response, and the measures of generator and scorer."""

    prompt_id: str
    sample_index: int
    seed: int
    prompt_ids: NDArray[np.int64]
    """[P]"""
    response_ids: NDArray[np.int64]
    """[R]"""
    generator_logprobs: NDArray[np.float32]
    """[W] the generator's log-probs of the sampled tokens at the sampling temperature, nats."""
    versions: NDArray[np.int64]
    """[W] version of the weights that sampled each token."""
    finish_reason: FinishReason
    rewards: dict[str, float] = field(default_factory=dict)
    """Weighted scores of the whole response, by the name of the reward; the learner adds them up."""
    ref_logprobs: NDArray[np.float32] | None = None
    """[W] the reference policy's log-probs of the same tokens at the same temperature, nats; None before scoring."""
    gold: float | None = None
    """The labeller's own measure of the response, or None; it is watched and never trained on."""
    written: NDArray[np.bool_] | None = None
    """[R] whether the policy wrote the token. The other tokens are an environment's. None: it wrote all, and W is R."""
    turns: int = 1
    """How often the policy wrote."""
    environment_reward: float | None = None
    """Sum of the environment's rewards; None without one."""
    wording: Wording | None = None
    """How its text is worded, where that is watched."""
    counted: dict[str, int] = field(default_factory=dict)
    """What rewards count beside their scores, such as the tokens of judges; the metrics have the sum over a batch."""
    minimum: Minimum | None = None
    """The shortest turn with which it was sampled; None if a turn could end at once, or if nothing was sampled."""

    @classmethod
    def given(cls, prompt_id: str, index: int, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Trajectory:
        """A response that nobody samples now, to be scored: as if it had ended by itself."""
        ids = np.array(prompt_ids, np.int64), np.array(response_ids, np.int64)
        nothing = np.zeros(len(response_ids), np.float32), np.zeros(len(response_ids), np.int64)
        return cls(prompt_id, index, 0, *ids, *nothing, "eos")

    @property
    def written_tokens(self) -> int:
        """W"""
        return len(self.versions)

    @property
    def length(self) -> int:
        """P + R: the tokens of a forward pass over this trajectory."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def log_ratio(self) -> float:
        """Sum over the response's tokens of log p - log p_ref, in nats (the k1 estimate of the response's KL)."""
        assert self.ref_logprobs is not None
        return float(np.sum(self.generator_logprobs.astype(np.float64) - self.ref_logprobs))

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """[P + R] prompt, then response."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all arrays as one string of bytes: five arrays by themselves would be most of a message's cost."""
        # int32 is enough for ids: vocabularies are far smaller than 2^31.
        arrays = (
            self.prompt_ids.astype(np.int32),
            self.response_ids.astype(np.int32),
            self.versions.astype(np.int64),
            self.generator_logprobs.astype(np.float32),
            *(() if self.ref_logprobs is None else (self.ref_logprobs.astype(np.float32),)),
        )
        written = None if self.written is None else self.written.tobytes()
        packed = b"".join([array.tobytes() for array in arrays])
        about = (self.prompt_id, self.sample_index, self.seed, self.finish_reason, self.rewards, self.gold)
        turns = (written, self.turns, self.environment_reward, self.wording, self.counted, self.minimum)
        return _unpacked, (packed, len(self.prompt_ids), len(self.response_ids), self.written_tokens, *about, *turns)


def _unpacked(
    packed: bytes,
    prompt: int,
    response: int,
    own: int,
    prompt_id: str,
    sample_index: int,
    seed: int,
    finish_reason: FinishReason,
    rewards: dict[str, float],
    gold: float | None,
    written: bytes | None,
    turns: int,
    environment_reward: float | None,
    wording: Wording | None,
    counted: dict[str, int],
    minimum: Minimum | None,
) -> Trajectory:
    ids = np.frombuffer(packed, np.int32, prompt + response).astype(np.int64)
    start = 4 * (prompt + response)  # the bytes of the ids; versions follow, then log-probs
    # Copies, since arrays over a string of bytes are read-only.
    versions = np.frombuffer(packed, np.int64, own, start).copy()
    logprobs = np.frombuffer(packed, np.float32, offset=start + 8 * own).copy()
    return Trajectory(
        prompt_id=prompt_id,
        sample_index=sample_index,
        seed=seed,
        prompt_ids=ids[:prompt],
        response_ids=ids[prompt:],
        generator_logprobs=logprobs[:own],
        versions=versions,
        finish_reason=finish_reason,
        rewards=rewards,
        ref_logprobs=logprobs[own:] if len(logprobs) > own else None,
        gold=gold,
        written=None if written is None else np.frombuffer(written, np.bool_).copy(),
        turns=turns,
        environment_reward=environment_reward,
        wording=wording,
        counted=counted,
        minimum=minimum,
    )


class SerializedTrajectory(NamedTuple):
    """A trajectory on its way through the coordinator.

    The coordinator needs these few figures only, and passes `data` on without unpickling it.
    """

    sample_index: int
    length: int
    """P + R"""
    written_tokens: int
    """W"""
    turns: int
    ended: bool
    """Whether the response ended by itself."""
    oldest: int
    """Weight version of its oldest token."""
    newest: int
    """Weight version of its newest token."""
    version_sum: int
    """Sum of all its tokens' versions, from which a batch's mean staleness follows."""
    gold: float | None
    wording: Wording | None
    rewards: dict[str, float]
    counted: dict[str, int]
    data: bytes
    """The pickled trajectory."""

    @classmethod
    def of(cls, t: Trajectory) -> SerializedTrajectory:
        """Serialize a trajectory."""
        versions = t.versions.tolist()
        return cls(
            t.sample_index,
            t.length,
            len(versions),
            t.turns,
            t.finish_reason == "eos",
            min(versions),
            max(versions),
            sum(versions),
            t.gold,
            t.wording,
            t.rewards,
            t.counted,
            pickle.dumps(t, protocol=5),
        )

    def load(self) -> Trajectory:
        """The trajectory again."""
        trajectory: Trajectory = pickle.loads(self.data)
        return trajectory


def derive_seed(*parts: int | str) -> int:
    """A 31-bit seed from the run's seed and the parts that identify a sample; the same on every machine."""
    # A separator that no id contains keeps ("1", "23") and ("12", "3") apart.
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF
