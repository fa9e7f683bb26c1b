"""The coefficient beta of the KL penalty: fixed, or steered towards a target."""

from __future__ import annotations

from rayrlhf.config_rl import KLConfig


class KLController:
    """beta (score units per nat), fixed or following the measured KL divergence.

    The adaptive one is that of Ziegler et al. 2019, section 2.2. After every batch of n samples

        beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon

    with KL and target in nats per response. So a KL above its target makes the penalty heavier.
    """

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.beta = config.coefficient

    def update(self, kl: float, samples: int) -> None:
        """Adapt beta after a batch, if the config asks for it.

        Args:
            kl: of the batch, mean over its responses in nats.
            samples: responses in the batch.
        """
        if self.config.adaptive:
            error = min(0.2, max(-0.2, kl / self.config.target - 1.0))
            # samples / horizon counts as 1 at most: from 5 on, an error of -0.2 would make beta 0 or negative for good.
            self.beta *= 1.0 + error * min(1.0, samples / self.config.horizon)
