"""The one forward pass: log-probs, values and scores of a batch.

Learner, scorer and the SFT and reward-model stages all call these functions, at the same temperature and in the
same precision, so that their numbers can be compared. N is the number of predicted tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rayrlhf.models.attention import packed_arguments
from rayrlhf.models.batching import TokenBatch

LOGITS = 2**25
"""Most logits that are held at once: 128 MiB of float32, and the same again for their log-softmax and its gradient."""


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    """[N] log pi(token | what precedes it), nats, float32"""
    entropy: Tensor
    """[N] entropy of the distribution each token was drawn from, nats, float32"""


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[L * T, H] last hidden states of all positions, line by line.

    `rayrlhf.models.batching` says why right padding needs no mask, and `rayrlhf.models.attention` what packed batches
    are.
    """
    packed = {} if batch.positions is None else packed_arguments(model, batch.pieces, batch.positions)
    return model.base_model(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state.flatten(0, 1)


def token_logprobs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """[N] log pi(token | what precedes it), nats, float32, under a causal language model at `temperature`."""
    return _of_logits(_chosen, model, batch, temperature)


@torch.no_grad()
def token_logprobs_and_entropy(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> TokenLogprobs:
    """`token_logprobs` without gradient, and the entropy, which costs a good part of a log-softmax more."""
    return TokenLogprobs(*_of_logits(_chosen_and_entropy, model, batch, temperature).unbind(-1))


def token_values(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[N] float32 value of the state in which each predicted token was chosen. `model` has a scalar `score` head.

    A value model that starts as a reward model starts with its scores, `reward_bias` included.
    """
    return _scalar_head(model, hidden_states(model, batch)[batch.states])


def sequence_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B] float32 scalar at the last real token of each row, plus the model's stored `reward_bias`.

    The bias makes reference answers score 0 on average (Ziegler et al. 2019, section 2.1); a plain loader of the
    saved model differs from this function by exactly that constant.
    """
    return _scalar_head(model, hidden_states(model, batch)[batch.ends])


def _scalar_head(model: PreTrainedModel, states: Tensor) -> Tensor:
    # In float32 also under autocast: bfloat16 would round scores to three digits.
    with torch.autocast(states.device.type, enabled=False):
        scores: Tensor = model.score(states.float()).squeeze(-1)
    return scores + float(getattr(model.config, "reward_bias", 0.0))


def _of_logits(
    measure: Callable[[Tensor, Tensor], Tensor], model: PreTrainedModel, batch: TokenBatch, temperature: float
) -> Tensor:
    """[N, ...] `measure` of the float32 logits [n, V] and targets [n] of all predicted tokens, n of them at a time.

    There are logits of predicted tokens only, and never more than `LOGITS` at once: where there would be, a chunk's are
    computed again in the backward pass.
    """
    states = hidden_states(model, batch)[batch.states]
    head: Any = model.get_output_embeddings()

    def measured(states: Tensor, targets: Tensor) -> Tensor:
        # The states are divided, not the logits, of which there are far more.
        logits = head(states / temperature).float()
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias * (1.0 / temperature - 1.0)
        return measure(logits, targets)

    size = max(1, LOGITS // head.weight.shape[0])
    if len(states) <= size:
        return measured(states, batch.targets)
    chunks = zip(states.split(size), batch.targets.split(size), strict=True)
    return torch.cat([checkpoint(measured, *each, use_reentrant=False, preserve_rng_state=False) for each in chunks])


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(logits, targets, reduction="none")


def _chosen_and_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs = log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.stack([chosen, -(logprobs.exp() * logprobs).sum(-1)], dim=-1)
