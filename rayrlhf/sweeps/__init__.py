"""Hyper-parameter sweeps: their plan and their results. Ray Tune runs them in `jobs.sweep`."""
