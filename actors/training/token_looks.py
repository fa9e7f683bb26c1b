"""A few trajectories that `rl` learns from, token by token: `tokens.jsonl` of the run, for its report.

    {"step": 10, "id": "105g9f", "prompt": "...", "score": 0.5, "ended": true, "tokens": [" a", " cat", "</s>"],
     "logprobs": [...], "ref_logprobs": [...], "advantages": [...], "values": [...]}

All lists have one entry for each token that the policy wrote. The file has those of the newest look alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rayrlhf.algorithms.experience import Fixed
from rayrlhf.config_rl import RLConfig
from rayrlhf.files import replacing
from rayrlhf.rewards.score import score_of
from rayrlhf.runs.folder import RunFolder
from rayrlhf.trajectory import Trajectory

MEASURES = {
    "logprobs": "old_logprobs", "ref_logprobs": "ref_logprobs", "advantages": "advantages", "values": "old_values",
}  # fmt: skip
"""Name in the file, and the field of `Fixed`."""


def looks_due(config: RLConfig, step: int) -> bool:
    """Whether the tokens of this step, counted from 1, are written: as often as `rl.sample_every`, and of the last."""
    every = config.sample_every
    return every is not None and (step % every == 0 or step == config.steps)


def write_looks(
    run: RunFolder,
    step: int,
    looked_at: Sequence[tuple[Trajectory, Fixed]],
    tokenizer: PreTrainedTokenizerBase,
    missing_eos_reward: float | None,
) -> None:
    """Write the file.

    Args:
        run: the run.
        step: that has just been learnt from, counted from 1.
        looked_at: trajectories with what was learnt from each token, as `Trainer.looked_at`.
        tokenizer: of the policy.
        missing_eos_reward: the score of a response that does not end.
    """
    rows = [_row(step, trajectory, fixed, tokenizer, missing_eos_reward) for trajectory, fixed in looked_at]
    with replacing(run.tokens) as temporary:
        temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    run.upload(run.tokens)


def _row(
    step: int,
    trajectory: Trajectory,
    fixed: Fixed,
    tokenizer: PreTrainedTokenizerBase,
    missing_eos_reward: float | None,
) -> dict[str, Any]:
    ids, ended = trajectory.response_ids, trajectory.finish_reason == "eos"
    own = ids if trajectory.written is None else ids[trajectory.written]
    measured = {name: getattr(fixed, field) for name, field in MEASURES.items()}
    return {
        "step": step,
        "id": trajectory.prompt_id,
        "prompt": tokenizer.decode(trajectory.prompt_ids.tolist(), skip_special_tokens=True),
        "score": score_of(trajectory.rewards, ended, missing_eos_reward),
        "ended": ended,
        "tokens": [tokenizer.decode([token]) for token in own.tolist()],
        **{name: _plain(values) for name, values in measured.items() if values is not None},
    }


def _plain(values: torch.Tensor) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
