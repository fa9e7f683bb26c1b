"""What is kept of a few trajectories, token by token: the numbers that were learnt from, at the right tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.training.token_looks import looks_due, write_looks
from rayrlhf.algorithms.experience import Fixed
from rayrlhf.algorithms.trainer import LOOKED_AT
from rayrlhf.config_rl import GRPOConfig
from rayrlhf.runs.folder import RunFolder
from rayrlhf.trajectory import Trajectory
from tests.tiny import TEMPERATURE
from tests.unit.test_algorithms import batch_of, learner


class Letters:
    """A tokenizer: token n is the letter of that number."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def written(run: RunFolder, *looks: tuple[Trajectory, Fixed]) -> list[dict[str, Any]]:
    write_looks(run, 10, looks, Letters(), None)
    return [json.loads(line) for line in run.tokens.read_text(encoding="utf-8").splitlines()]


def test_numbers_are_those_that_were_learnt_from(tmp_path: Path) -> None:
    """Log-probs are those of transformers before the update; of two scores, GRPO's advantages are ±1 / sqrt 2."""
    trainer, batch = learner(GRPOConfig(samples_per_prompt=2)), batch_of()
    expected = {}
    for t in batch:
        ids = torch.tensor([*t.prompt_ids, *t.response_ids])
        with torch.no_grad():
            logits = trainer.policy.model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1] / TEMPERATURE
        expected[t.prompt_id, t.sample_index] = logits.log_softmax(-1).gather(1, ids[len(t.prompt_ids) :, None])[:, 0]
    trainer.step(batch, 0)
    assert len(trainer.looked_at) == LOOKED_AT
    rows = written(RunFolder(tmp_path), *trainer.looked_at)
    for (t, _), row in zip(trainer.looked_at, rows, strict=True):
        assert row["logprobs"] == pytest.approx(expected[t.prompt_id, t.sample_index].tolist(), abs=1e-4)
        assert t.ref_logprobs is not None and row["ref_logprobs"] == pytest.approx(t.ref_logprobs.tolist(), abs=1e-4)
        assert [abs(value) for value in row["advantages"]] == pytest.approx(
            [math.sqrt(0.5)] * len(t.response_ids), abs=1e-4
        )
        assert len(row["tokens"]) == len(t.response_ids) and "values" not in row


def test_only_the_policys_own_tokens_are_kept(tmp_path: Path) -> None:
    own = np.array([True, False, True])
    trajectory = Trajectory(
        "p", 0, 0, np.array([7, 8]), np.array([0, 1, 2]), np.zeros(2, np.float32), np.zeros(2, np.int64), "length",
        {"a": 0.5, "b": 0.25}, written=own,
    )  # fmt: skip
    numbers = [torch.tensor([value, value + 1]) for value in (-1.0, -2.0, 3.0, 1.0, 4.0, 5.0)]
    numbers[0][1] = -math.inf
    (row,) = written(RunFolder(tmp_path), (trajectory, Fixed(*numbers)))
    assert row == {
        "step": 10, "id": "p", "prompt": "hi", "score": 0.75, "ended": False, "tokens": ["a", "c"],
        "logprobs": [-1.0, None], "ref_logprobs": [-2.0, -1.0], "advantages": [3.0, 4.0], "values": [4.0, 5.0],
    }  # fmt: skip


def test_they_are_written_as_often_as_samples_are() -> None:
    config = GRPOConfig(samples_per_prompt=2, steps=25, sample_every=10)
    assert [step for step in range(1, 26) if looks_due(config, step)] == [10, 20, 25]
    assert not looks_due(config.model_copy(update={"sample_every": None}), 25)
