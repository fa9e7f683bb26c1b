"""The loops that train inside Ray Train's workers: SFT, reward model, DPO and RL, one file each.

`loop` has what all of them share, `pairs` what the reward model and DPO share. `workers` is the group of processes
that runs them one after the other, `tasks` what they are to do next, `silent_ranks` the end of those that hang.
"""
