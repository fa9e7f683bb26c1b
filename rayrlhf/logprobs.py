"""The one forward pass: log-probs, values and scores of a batch.

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


_SHARING = {"opt", "gpt2", "gptj", "gpt_neox", "llama", "qwen2"}
"""Architectures that take any mask and positions, as tests show. BLOOM's positions are in its attention scores."""


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether rows with the same prompt may share a line of a batch (see `rayrlhf.batching`)."""
    config = model.config
    # Our own mask would take the place of the one that a sliding window is made of.
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return config.model_type in _SHARING and not windowed


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[L * T, H] last hidden states of all positions, line by line.

    A mask is passed only where rows share a prompt: see `rayrlhf.batching` for why right padding needs none.
    """
    layout: dict[str, Tensor] = {}
    visible = batch.visible()
    if visible is not None and batch.positions is not None:
        # What is added to the attention's scores: the one form of a mask that all architectures read alike.
        hidden = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, torch.finfo(torch.float32).min)
        layout = {"attention_mask": hidden, "position_ids": batch.positions}
    return model.base_model(input_ids=batch.input_ids, use_cache=False, **layout).last_hidden_state.flatten(0, 1)


def token_logprobs(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probs of the batch's predicted tokens under a causal language model at `temperature`.

    Logits are computed at the predicted positions only, never [tokens x vocabulary] for the prompt.
    """
    logits = model.get_output_embeddings()(hidden_states(model, batch)[batch.states]).float() / temperature
    log_z = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1) - log_z
    with torch.no_grad():
        probabilities = torch.exp(logits - log_z.unsqueeze(-1))
        entropy = log_z - (probabilities * logits).sum(-1)
    return TokenLogprobs(logprobs, entropy)


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
