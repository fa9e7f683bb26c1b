"""What is learnt from a batch: losses, advantages, optimiser, metrics. One file an algorithm."""
