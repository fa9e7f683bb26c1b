"""Runs in rounds without models: their configs, evaluations by given numbers, and stages that only write outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.reports.round_measures import RoundResult
from rayrlhf.runs.folder import open_or_create
from rayrlhf.runs.stages import stages_of
from rayrlhf.runs.starts import find_models

RUN = "/runs/mine"


def config(rounds: dict[str, Any] | None = None, /, **sections: Any) -> Config:
    return parse_config({"name": "mine", "rounds": {"count": 3, **(rounds or {})}, **sections}, "test")


def interval(mean: float, half: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 50}


def evaluation(number: int, rate: float, gold: float, reward: float) -> dict[str, Any]:
    """evaluation.json of a round: win rate over the round before, and changes of gold and reward to it."""
    before = "sft" if number == 1 else "previous"
    policy = {"gold": interval(0.2 + 0.01 * number), "reward": interval(1.0), "kl": interval(2.0)}
    policy |= {f"gold_win_rate_vs_{before}": interval(rate), f"win_rate_vs_{before}": interval(0.9)}
    return {
        "sft": {"gold": interval(0.2)},
        "policy": {"gold_win_rate_vs_sft": interval(0.5 + 0.1 * number), **policy},
        "differences": {
            "policy_minus_sft": {},
            f"policy_minus_{before}": {"gold": interval(gold), "reward": interval(reward)},
        },
    }


def results(*rounds: tuple[float, float, float]) -> list[RoundResult]:
    return [RoundResult(n, evaluation(n, *each), {}) for n, each in enumerate(rounds, 1)]


def pairs(rows: list[tuple[int, str, float]]) -> pa.Table:
    return pa.Table.from_pylist([{"prompt": p, "source": s, "reward_model": m} for p, s, m in rows])


class Killed(Exception):
    pass


def write_model(directory: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, directory / "model.safetensors")


def stages_that(log: list[str], rates: list[float], kill: str = "") -> Callable[[Config], None]:
    """Does the stages of a round that are not done, by their outputs alone, and is killed before one."""

    def run_once(own: Config) -> None:
        run = open_or_create(own, own.runs_dir)
        number = int(own.name.removeprefix("round-"))
        find_models(own)  # what it begins with is there
        for stage in stages_of(own):
            if run.done(stage.name):
                continue
            if f"{own.name} {stage.name}" == kill:
                raise Killed
            log.append(f"{own.name} {stage.name}")
            with run.writing(stage.name) as output:
                if output.is_dir():
                    write_model(output)
                elif stage.name == "evaluate":
                    output.write_text(json.dumps(evaluation(number, rates[number - 1], 0.1, 0.1)))
                else:
                    output.write_text(own.name)
            if stage.name == "reward_model":
                sources = [f"round-{n}" if number > 1 else "" for n in range(1, number + 1)]
                pq.write_table(pairs([(i, source, 1.0) for i, source in enumerate(sources)]), run.heldout_pairs)

    return run_once


EACH = ["sft", "collect", "reward_model", "rl", "evaluate"]
