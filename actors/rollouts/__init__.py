"""Generators, scorers, and the coordinator that keeps them at work.

`in_turn` and `ahead` are the two ways of rollouts; `engine` is the only door to vLLM.
"""
