"""Log-probs, values and scores of one batch: what a model computes, written once.

Training and scoring both come here, by way of `rayrlhf.models.forward`, so that their numbers can be compared: the
ratio of two log-probs means something only if both were computed alike. N is the number of predicted tokens of the
batch, B the number of its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rayrlhf.models.attention import packed_arguments
from rayrlhf.models.batching import TokenBatch

LOGITS = 2**25
"""Most logits that are held at once: 128 MiB of float32, and the same again for their log-softmax and its gradient.

A batch of 4096 tokens with a vocabulary of 150,000 would have nearly twenty times as many.
"""


BARRED = torch.finfo(torch.float32).min
"""The logit of a token that could not be drawn. Its probability is exactly 0, as that of -inf would be; but p log p,
which the entropy adds up, is then 0 and not NaN."""


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    """[N] log pi(token | what precedes it), nats, float32"""
    entropy: Tensor
    """[N] entropy of the distribution from which each token was drawn, nats, float32"""


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[L * T, H] last hidden states of all positions, line by line.

    No attention mask for padding: `rayrlhf.models.batching` says why none is needed.
    """
    packed = {} if batch.positions is None else packed_arguments(model, batch.pieces, batch.positions)
    return model.base_model(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state.flatten(0, 1)


def token_logprobs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """[N] log pi(token | what precedes it), nats, float32, under a causal language model at `temperature`.

    pi is the softmax over all ids but those of `batch.barred`.
    """
    return _of_logits(_chosen, model, batch, temperature)


@torch.no_grad()
def token_logprobs_and_entropy(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> TokenLogprobs:
    """`token_logprobs` and the entropy, without gradient. The entropy takes most of another log-softmax."""
    return TokenLogprobs(*_of_logits(_chosen_and_entropy, model, batch, temperature).unbind(-1))


def token_values(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[N] float32 value of the state in which each predicted token was chosen. `model` has a scalar `score` head.

    `reward_bias` is added as it is to scores: a value model that starts as a reward model starts with that model's
    scores.
    """
    return _scalar_head(model, hidden_states(model, batch)[batch.states])


def sequence_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B] float32 output of the `score` head at the last real token of each row, plus the model's `reward_bias`.

    The bias makes reference answers score 0 on average (Ziegler et al. 2019, section 2.1). It is stored in the config,
    not in the head, so transformers' own forward pass of the saved model gives scores that are lower by the bias.
    """
    return _scalar_head(model, hidden_states(model, batch)[batch.ends])


def _scalar_head(model: PreTrainedModel, states: Tensor) -> Tensor:
    # In float32 also under autocast: bfloat16 would leave less than three digits of a score.
    with torch.autocast(states.device.type, enabled=False):
        scores: Tensor = model.score(states.float()).squeeze(-1)
    return scores + float(getattr(model.config, "reward_bias", 0.0))


def _of_logits(
    measure: Callable[[Tensor, Tensor], Tensor], model: PreTrainedModel, batch: TokenBatch, temperature: float
) -> Tensor:
    """[N, ...] what `measure` gives for the logits of all predicted tokens.

    Logits are computed for predicted tokens only, and never more than `LOGITS` at once. If that takes several chunks,
    the logits of a chunk are dropped after use and computed again in the backward pass.

    Args:
        measure: takes float32 logits [n, V] and targets [n] of n tokens, and gives [n, ...].
        model: a causal language model whose logits are those of its output head (`load_policy` sees to that).
        batch: with V token ids in the vocabulary.
        temperature: divides the logits.
    """
    states = hidden_states(model, batch)[batch.states]
    head: Any = model.get_output_embeddings()

    def measured(states: Tensor, targets: Tensor, barred: Tensor) -> Tensor:
        # Dividing the states by the temperature divides the logits, of which there are far more.
        logits = head(states / temperature).float()
        if getattr(head, "bias", None) is not None:
            # The head has added its bias undivided.
            logits = logits + head.bias * (1.0 / temperature - 1.0)
        if len(barred):
            # In place, for the sake of memory. What is written over has no gradient.
            logits[barred[:, 0], barred[:, 1]] = BARRED
        return measure(logits, targets)

    size = max(1, LOGITS // head.weight.shape[0])
    if len(states) <= size:
        return measured(states, batch.targets, batch.barred)
    chunks = zip(states.split(size), batch.targets.split(size), _chunks(batch.barred, size), strict=False)
    return torch.cat([checkpoint(measured, *each, use_reentrant=False, preserve_rng_state=False) for each in chunks])


def _chunks(barred: Tensor, size: int) -> Iterator[Tensor]:
    """What could not be drawn, for each `size` predicted tokens, which are counted from the start of their chunk."""
    for start in itertools.count(0, size):
        own = (barred[:, 0] >= start) & (barred[:, 0] < start + size)
        yield barred[own] - barred.new_tensor([start, 0])


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(logits, targets, reduction="none")


def _chosen_and_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs = log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.stack([chosen, -(logprobs.exp() * logprobs).sum(-1)], dim=-1)
