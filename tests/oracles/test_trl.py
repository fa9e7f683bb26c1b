"""The small pieces of PPO against TRL 1.12: masked statistics, and log-probs at a temperature.

TRL works on padded [B, R] tensors and masks, ours on the same or on flat [N] tokens. TRL left-padded batches with an
attention mask and ours right-padded without one must give the same log-probs. Two differences of convention are
allowed for: TRL divides logits by temperature + 1e-7, and its whitening leaves numbers in the padding, ours zeros.
Its KL rewards are written inside its training loop: `test_trl_update.py` runs that.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.ppo.ppo_trainer import forward, masked_mean, masked_var, masked_whiten
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from rayrlhf.algorithms.advantages import whiten
from rayrlhf.data.rows import Row
from rayrlhf.models.batching import collate
from rayrlhf.models.loading import load_policy, resolve_model
from rayrlhf.models.logprobs import token_logprobs_and_entropy

PAD = 1


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_masked_tokens(shift_mean: bool) -> None:
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 1, 5, 3])[:, None]
    x = 3.0 + 2.0 * torch.randn(mask.shape)
    found = whiten(x, mask, lambda t: t, shift_mean=shift_mean)
    torch.testing.assert_close(found[mask], masked_whiten(x, mask, shift_mean)[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked_mean(found, mask), masked_mean(x, mask) * (not shift_mean), rtol=1e-5, atol=1e-5)
    assert float(masked_var(found, mask)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_and_entropy_at_a_temperature_whatever_the_padding(temperature: float) -> None:
    policy = load_policy(resolve_model("embedded:opt-tiny"))
    generator = torch.Generator().manual_seed(4)
    lengths, width = [(9, 6), (3, 6), (14, 6), (5, 6)], 6
    pairs = [[torch.randint(3, policy.config.vocab_size, (n,), generator=generator) for n in pair] for pair in lengths]
    with torch.no_grad():
        batch = collate([Row.completion(p.numpy(), r.numpy()) for p, r in pairs], PAD)
        ours = token_logprobs_and_entropy(policy, batch, temperature)
        queries = pad_sequence([p for p, _ in pairs], batch_first=True, padding_value=PAD, padding_side="left")
        responses = torch.stack([r for _, r in pairs])
        output = forward(policy, torch.cat([queries, responses], 1), PAD)
        logits = output.logits[:, queries.shape[1] - 1 : -1] / (temperature + 1e-7)
    theirs = selective_log_softmax(logits, responses)
    assert ours.logprobs.shape == (len(pairs) * width,)
    torch.testing.assert_close(ours.logprobs, theirs.flatten(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.entropy, entropy_from_logits(logits).flatten(), rtol=1e-4, atol=1e-4)
    assert float(theirs.mean()) < -math.log(10)  # nothing trivial
