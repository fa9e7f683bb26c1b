"""Reward-model steps against TRL's RewardTrainer: the same pairs, batch and optimiser.

Ours is the stage's own loop (`actors.training.reward_model` in this process); its steps are timed by itself.
A prompt has two answers, or four: then ours scores four rows for its six pairs, and RewardTrainer, which knows pairs
only, gets all six with both of their rows.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import Child, alternate, column, main
from benchmarks.results import Comparison, Measurement, Result
from benchmarks.sft import step_timer, training_arguments
from benchmarks.workload import CAP, MODEL, RESPONSE, THREADS, demonstrations
from rayrlhf.config import Config, RewardModelConfig
from rayrlhf.config_resources import LearnerConfig, ResourcesConfig
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import encode_prompts, encode_responses
from rayrlhf.models.loading import load_reward_model, load_tokenizer
from rayrlhf.sections import OptimizerConfig

PROMPTS, LEARNING_RATE = 16, 1e-4
MICRO_BATCH = 8
"""Pairs, so 16 rows."""


def comparisons(count: int, answers: int, turn: int) -> list[RankedAnswers]:
    """Prompts capped at 512 tokens, ranked: the author's own summary before those of other posts."""
    found, tokenizer = demonstrations(CAP), load_tokenizer(MODEL)
    chosen = np.random.default_rng([turn, count]).choice(len(found), count + answers - 1, replace=False)
    records = [found[i] for i in chosen]
    prompts = encode_prompts(tokenizer, [record.prompt for record in records])
    texts = [record.response for record in records]
    responses = [tuple(ids) for ids in encode_responses(tokenizer, texts, RESPONSE, [r.prompt for r in records])]
    return [
        RankedAnswers(
            records[i].id, records[i].prompt, tuple(prompts[i]), tuple(texts[i : i + answers]),
            tuple(responses[i : i + answers]), None, "benchmark",
        )
        for i in range(count)
    ]  # fmt: skip


class Contestant(ABC):
    """Trains on a turn's comparisons; warmed up with one batch."""

    def __init__(self, count: int, answers: int, batch: int = PROMPTS) -> None:
        self.count, self.answers, self.batch = count, answers, batch
        self._train(comparisons(batch, 2, 99))

    def run(self, turn: int) -> Measurement:
        return self._train(comparisons(self.count, self.answers, turn))

    @abstractmethod
    def _train(self, train: Sequence[RankedAnswers]) -> Measurement: ...


class Ours(Contestant):
    def _train(self, train: Sequence[RankedAnswers]) -> Measurement:
        from actors.training.reward_model import RewardModelArguments, reward_model_loop
        from rayrlhf.runs.metrics import read_metrics

        learner = LearnerConfig(threads=THREADS)
        optimizer = OptimizerConfig(lr=LEARNING_RATE, schedule="constant")
        references = [Row.completion(c.prompt_ids[:32], c.response_ids[0]) for c in train[:1]]
        with tempfile.TemporaryDirectory() as directory:
            config = Config(
                name="reward-model", runs_dir=directory, resources=ResourcesConfig(learner=learner),
                reward_model=RewardModelConfig(prompts_per_batch=self.batch, optimizer=optimizer),
            )  # fmt: skip
            reward_model_loop(
                RewardModelArguments(config, directory, "reward_model", 1, MODEL, list(train), references)
            )
            steps = [r["time/step"] for r in read_metrics(Path(directory)) if "time/step" in r]
        return speed(train, sum(steps))


class TRL(Contestant):
    def _train(self, train: Sequence[RankedAnswers]) -> Measurement:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        pairs = [
            {
                "chosen_ids": [*c.prompt_ids, *c.response_ids[better]],
                "rejected_ids": [*c.prompt_ids, *c.response_ids[worse]],
            }
            for c in train
            for better, worse in c.pairs
        ]
        batch = self.batch * len(train[0].pairs)
        with tempfile.TemporaryDirectory() as directory:
            trainer = RewardTrainer(
                load_reward_model(MODEL, fresh_head_seed=0),
                RewardConfig(**training_arguments(directory, min(MICRO_BATCH, batch), batch), max_length=None),
                train_dataset=Dataset.from_list(pairs),
                processing_class=load_tokenizer(MODEL),
                callbacks=[timer := step_timer()],
            )
            trainer.train()
        return speed(train, timer.seconds)


def speed(train: Sequence[RankedAnswers], seconds: float) -> Measurement:
    return {"prompts/s": len(train) / seconds, "seconds": seconds}


def run(quick: bool) -> Result:
    turns, steps = (range(1), 1) if quick else (range(3), 3)
    result = Result(
        {
            "batch": f"{PROMPTS} prompts capped at {CAP} tokens, float32, {THREADS} threads, AdamW (fused)",
            "a turn": f"{steps} steps; RewardTrainer's micro-batches are {MICRO_BATCH} pairs",
        }
    )
    for answers in (2,) if quick else (2, 4):
        contestants = {
            "rayrlhf": partial(Child, Ours, steps * PROMPTS, answers, threads=THREADS),
            "TRL": partial(Child, TRL, steps * PROMPTS, answers, threads=THREADS),
        }
        measured = alternate(contestants, turns)
        own, other = (column(measured[name], "prompts/s") for name in contestants)
        name = f"reward-model step, {answers} answers a prompt"
        result.comparisons.append(Comparison(name, "prompts/s", own, other, "TRL 1.12.0 RewardTrainer"))
    return result


if __name__ == "__main__":
    main("reward_model")
