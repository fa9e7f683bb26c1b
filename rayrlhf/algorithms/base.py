"""What distinguishes one algorithm of reinforcement learning from another. `rayrlhf.algorithms.trainer` is the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rayrlhf.algorithms.advantages import AllReduce
from rayrlhf.algorithms.experience import Fixed, Groups, Sampled
from rayrlhf.algorithms.losses import PolicyLoss


class Algorithm(Protocol):
    """Advantages and a loss of the policy; see `rayrlhf.algorithms.grpo` for a short one."""

    def advantages(
        self, sampled: Sampled, scores: Tensor, groups: Groups, beta: float, all_reduce: AllReduce
    ) -> tuple[Tensor, Tensor | None]:
        """[B, R] advantages of this rank's B responses of at most R tokens; and the returns, the targets of a critic.

        Args:
            sampled: the responses, with `values` if the algorithm has a critic.
            scores: [B] of the responses, after `rl.reward_clip` and less the punishment by `rl.overlong_tokens`.
            groups: which responses have the same prompt, on all ranks.
            beta: coefficient of the KL penalty in the reward; 0 if the penalty is in the loss.
            all_reduce: sums over ranks, which call it equally often.
        """
        ...

    def policy_loss(self, logprobs: Tensor, fixed: Fixed, counts: Sequence[int]) -> PolicyLoss:
        """The loss of each of a micro-batch's N tokens, before importance weights and a KL penalty in the loss.

        Args:
            logprobs: [N] under the policy in training, nats, with gradient.
            fixed: of the same tokens.
            counts: tokens of each response, whose tokens lie behind one another. No response is ever cut.
        """
        ...
