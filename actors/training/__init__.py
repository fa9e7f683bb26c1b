"""The loops that train inside Ray Train's workers: SFT, reward model and RL, one file each.

`loop` is the frame that all three share, and `workers` the group of processes that runs them one after the other.
"""
