"""Benchmarks against what a user would run instead: `python -m benchmarks`, or `python -m benchmarks.NAME` for one."""
