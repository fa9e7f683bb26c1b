"""Generators, scorers, and the coordinator that keeps them at work.

`in_turn` and `ahead` are the two rollout modes; only `engine` and `engine_weights` import vLLM.
"""
