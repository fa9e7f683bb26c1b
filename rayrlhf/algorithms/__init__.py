"""Learning from a batch: PPO, its losses and advantages, the reward model's loss, SFT's, optimiser and metrics.

`rl` is the order of a step; `advantages`, `losses` and `kl` are its equations, as pure functions.
"""
