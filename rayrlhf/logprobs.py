"""The one forward pass: log-probs, values and scores of right-padded batches.

Learner, scorer and the SFT and reward-model stages all call these functions, at the same temperature and in the
same precision, so that their numbers can be compared. N is the number of predicted tokens of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayrlhf.batching import TokenBatch


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    """[N] log pi(token | what precedes it), nats, float32"""
    entropy: Tensor
    """[N] entropy of the distribution each token was drawn from, nats, float32, without gradient"""


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B, T, H] last hidden states. No mask is passed: see `rayrlhf.batching` for why right padding needs none."""
    return model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state


def states_before_tokens(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[N, H] for every predicted token the state one position before it: what the policy saw when it acted."""
    return hidden_states(model, batch)[:, :-1][batch.mask[:, 1:]]


def token_logprobs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probs of the batch's predicted tokens under a causal language model at `temperature`.

    Logits are computed at the predicted positions only, never [tokens x vocabulary] for the prompt.
    """
    targets = batch.input_ids[:, 1:][batch.mask[:, 1:]]
    logits = model.get_output_embeddings()(states_before_tokens(model, batch)).float() / temperature
    log_z = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_z
    with torch.no_grad():
        probabilities = torch.exp(logits - log_z.unsqueeze(-1))
        entropy = log_z - (probabilities * logits).sum(-1)
    return TokenLogprobs(logprobs, entropy)


def token_values(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[N] float32 value of the state in which each predicted token was chosen. `model` has a scalar `score` head.

    A value model that starts as a reward model starts with its scores, `reward_bias` included.
    """
    return _scalar_head(model, states_before_tokens(model, batch))


def sequence_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B] float32 scalar at the last real token of each row, plus the model's stored `reward_bias`.

    The bias makes reference answers score 0 on average (Ziegler et al. 2019, section 2.1); a plain loader of the
    saved model differs from this function by exactly that constant.
    """
    hidden = hidden_states(model, batch)
    return _scalar_head(model, hidden[torch.arange(len(hidden), device=hidden.device), batch.lengths - 1])


def _scalar_head(model: PreTrainedModel, states: Tensor) -> Tensor:
    # In float32 also under autocast: bfloat16 would round scores to three digits.
    with torch.autocast(states.device.type, enabled=False):
        scores: Tensor = model.score(states.float()).squeeze(-1)
    return scores + float(getattr(model.config, "reward_bias", 0.0))
