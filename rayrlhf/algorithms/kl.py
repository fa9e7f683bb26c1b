"""The coefficient beta of the KL penalty: fixed, or steered towards a target."""

from __future__ import annotations

from rayrlhf.config import KLConfig


class KLController:
    """beta, and how it follows the measured KL.

    Adaptive (Ziegler et al. 2019, section 2.2): beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon
    after every batch of n samples; KL and target in nats per response. Fixed: beta never changes.
    A batch of more samples than the horizon counts as the horizon: above five horizons beta would else reach 0.
    """

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.beta = config.coefficient

    def update(self, kl: float, samples: int) -> None:
        if self.config.adaptive:
            error = min(0.2, max(-0.2, kl / self.config.target - 1.0))
            self.beta *= 1.0 + error * min(1.0, samples / self.config.horizon)
