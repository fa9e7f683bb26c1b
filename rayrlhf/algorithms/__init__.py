"""Learning from a batch: a trainer, the algorithms' equations, the reward model's loss, SFT's, optimiser and metrics.

`trainer` is the order of a step of RL. `ppo`, `grpo`, `rloo` and `reinforce_pp` make advantages and a loss from the
pure functions in `advantages` and `losses`. `preferences` has the losses over ranked answers.
"""
