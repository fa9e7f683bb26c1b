"""PPO (Schulman et al. 2017) with a value model, used on language models as by Ziegler et al. 2019.

advantages   score less the KL penalty at every token -> generalised advantages -> whitened
loss         clipped surrogate, with a clipped value loss beside it (`rayrlhf.algorithms.critic`)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rayrlhf.algorithms.advantages import AllReduce, generalized_advantages, kl_penalised_rewards, whiten
from rayrlhf.algorithms.experience import Fixed, Groups, Sampled
from rayrlhf.algorithms.losses import PolicyLoss, clipped_surrogate
from rayrlhf.config_rl import PPOConfig


class PPO:
    """The equations; `rayrlhf.algorithms.trainer` calls them."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config

    def advantages(
        self, sampled: Sampled, scores: Tensor, groups: Groups, beta: float, all_reduce: AllReduce
    ) -> tuple[Tensor, Tensor | None]:
        """See `Algorithm.advantages`; the prompts play no part."""
        config, mask = self.config, sampled.mask
        assert sampled.values is not None, "PPO has a critic"
        # Ziegler et al. 2019, equation 2: the score less the KL penalty, token by token.
        rewards = kl_penalised_rewards(scores, sampled.logprobs, sampled.ref_logprobs, mask, beta)
        if config.whiten_rewards:
            # Their mean is kept: without it a response would gain or lose by its length.
            rewards = whiten(rewards, mask, all_reduce, shift_mean=False)
        # Schulman et al. 2016, equation 16; the returns are the value model's targets.
        advantages, returns = generalized_advantages(rewards, sampled.values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            # Not before the returns are taken: the value model learns them as they are.
            advantages = whiten(advantages, mask, all_reduce)
        return advantages, returns

    def policy_loss(self, logprobs: Tensor, fixed: Fixed, counts: Sequence[int]) -> PolicyLoss:
        """Schulman et al. 2017, equation 7."""
        config = self.config
        return clipped_surrogate(
            logprobs, fixed.old_logprobs, fixed.advantages, config.clip_range, config.clip_range_high
        )
