"""Trackers: where the metrics of a run go beside its own metrics.jsonl. Each is one file with one class."""
