"""Generators, scorers and the coordinator that keeps them at work."""
