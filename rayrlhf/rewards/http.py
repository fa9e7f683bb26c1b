"""A reward by a service of your own: responses are sent to it as JSON, and it answers with scores.

POST url   {"name": "style", "settings": {...}, "items": [
              {"prompt_id": "17", "sample": 0, "prompt": "...", "response": "...", "reference": "..." or null}, ...]}
answer     {"scores": [0.5, ...]}                                              one for each item, in their order

With `metadata: true` every item also has "metadata": {...}, the further columns of the prompt's row in the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.config_rewards import HttpReward
from rayrlhf.errors import UserError
from rayrlhf.rewards.base import TextReward
from rayrlhf.rewards.posting import post_all
from rayrlhf.trajectory import Trajectory


class HttpScores(TextReward):
    """The scores of one service."""

    reward: HttpReward

    def __init__(self, reward: HttpReward) -> None:
        self.reward = reward

    def __call__(self, trajectories: Sequence[Trajectory], told: Mapping[str, Sequence[Any]]) -> list[float]:
        items = [
            {"prompt_id": t.prompt_id, "sample": t.sample_index, "prompt": p, "response": r, "reference": ref}
            for t, p, r, ref in zip(trajectories, told["prompts"], told["responses"], told["references"], strict=True)
        ]
        if self.reward.metadata:
            items = [item | {"metadata": _as_json(m)} for item, m in zip(items, told["metadata"], strict=True)]
        size = self.reward.batch_size
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        about = {"name": self.reward.name, "settings": self.reward.settings}
        place = f"reward {self.reward.name!r} ({self.reward.url})"
        scores: list[float] = []
        for part, answer in zip(
            parts, post_all(self.reward, place, [about | {"items": p} for p in parts]), strict=True
        ):
            found = answer.get("scores") if isinstance(answer, dict) else None
            if not isinstance(found, list) or len(found) != len(part):
                got = f"{len(found)} scores" if isinstance(found, list) else f"no list of scores: {str(answer)[:200]}"
                raise UserError(f"{place} answered with {got} for {len(part)} items")
            for score, item in zip(found, part, strict=True):
                if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                    raise UserError(
                        f"{place} answered with {score!r} for prompt {item['prompt_id']!r}, sample {item['sample']}; "
                        "it must be a finite number"
                    )
                scores.append(float(score))
        return scores


def _as_json(metadata: Mapping[str, Any]) -> Any:
    """The same values; those that JSON lacks, such as dates and NaN, as text."""
    return json.loads(json.dumps(dict(metadata), default=str), parse_constant=str)
