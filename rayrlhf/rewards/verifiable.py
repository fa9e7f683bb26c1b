"""Rewards that a rule can check, for `rewards: [{kind: python, name: ..., path: rayrlhf.rewards.verifiable:exact}]`.

Each gives 1 for a response that keeps the rule and 0 for another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence


def exact(responses: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """Whether the response is the reference, blanks at both ends aside; 0 without a reference."""
    return [
        float(reference is not None and response.strip() == reference.strip())
        for response, reference in zip(responses, references, strict=True)
    ]


def contains(responses: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """Whether the reference stands somewhere in the response; 0 without a reference."""
    return [
        float(reference is not None and reference.strip() in response)
        for response, reference in zip(responses, references, strict=True)
    ]


def matches(responses: Sequence[str], pattern: str) -> list[float]:
    """Whether the whole response, blanks at both ends aside, matches a regular expression."""
    rule = re.compile(pattern, re.DOTALL)
    return [float(rule.fullmatch(response.strip()) is not None) for response in responses]


def length(token_ids: Sequence[Sequence[int]], least: int = 0, most: int | None = None) -> list[float]:
    """Whether the response has at least `least` and at most `most` tokens."""
    return [float(len(ids) >= least and (most is None or len(ids) <= most)) for ids in token_ids]


def valid_json(responses: Sequence[str]) -> list[float]:
    """Whether the response is a JSON value."""
    return [float(_is_json(response)) for response in responses]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
