"""Learning from a batch: a trainer, the algorithms' equations, the reward model's loss, SFT's, optimiser and metrics.

`trainer` is the order of a step. `ppo`, `grpo`, `rloo` and `reinforce_pp` say how advantages and loss are made, of the
pure functions in `advantages` and `losses`.
"""
