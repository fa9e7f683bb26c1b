"""Judging responses: reward functions, labellers, the gold measure, ROUGE."""
