"""Benchmarks against what a user would run instead. `python -m benchmarks` runs all, `python -m benchmarks.NAME` one."""
