"""SFT steps against transformers.Trainer: the same demonstrations, batch size and optimiser.

Ours is the stage's own loop (`actors.training.sft` in this process); its steps are timed by itself. The Trainer gets
micro-batches of rows of like length, its option for such data, and labels that cover the responses only.
"""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Child, alternate, column, main
from benchmarks.results import Comparison, Measurement, Result
from benchmarks.workload import CAP, MODEL, RESPONSE, THREADS, demonstrations
from rayrlhf.config import Config, SFTConfig
from rayrlhf.config_resources import LearnerConfig, ResourcesConfig
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import encode_prompts, encode_responses
from rayrlhf.models.loading import load_policy, load_tokenizer
from rayrlhf.sections import OptimizerConfig

BATCH, LEARNING_RATE = 32, 1e-4
MICRO_BATCH = 8


def rows(count: int, turn: int) -> list[Row]:
    """A random choice of demonstrations, prompts capped at 512 tokens, the same for both sides."""
    found = demonstrations(CAP)
    tokenizer = load_tokenizer(MODEL)
    chosen = [found[i] for i in np.random.default_rng([turn, count]).choice(len(found), count, replace=False)]
    prompts = encode_prompts(tokenizer, [record.prompt for record in chosen])
    texts = [record.response for record in chosen]
    responses = encode_responses(tokenizer, texts, RESPONSE, [record.prompt for record in chosen])
    return [Row.completion(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


class Contestant(ABC):
    """Trains on a turn's rows; warmed up with one batch."""

    def __init__(self, count: int, batch: int = BATCH) -> None:
        self.count, self.batch = count, batch
        self._train(rows(batch, 99))

    def run(self, turn: int) -> Measurement:
        return self._train(rows(self.count, turn))

    @abstractmethod
    def _train(self, train: Sequence[Row]) -> Measurement: ...


class Ours(Contestant):
    def _train(self, train: Sequence[Row]) -> Measurement:
        from actors.training.sft import DevPrompt, SFTArguments, sft_loop
        from rayrlhf.runs.metrics import read_metrics

        dev = [DevPrompt("dev", tuple(train[0].ids[:32]), (5, 2), "")]
        learner = LearnerConfig(threads=THREADS)
        optimizer = OptimizerConfig(lr=LEARNING_RATE, schedule="constant")
        with tempfile.TemporaryDirectory() as directory:
            config = Config(
                name="sft", runs_dir=directory, sft=SFTConfig(batch_size=self.batch, optimizer=optimizer),
                resources=ResourcesConfig(learner=learner),
            )  # fmt: skip
            arguments = SFTArguments(config, directory, "sft", 1, MODEL, list(train), dev, None)
            sft_loop(arguments)
            steps = [r["time/step"] for r in read_metrics(Path(directory)) if "time/step" in r]
        return speed(train, sum(steps))


class Transformers(Contestant):
    def _train(self, train: Sequence[Row]) -> Measurement:
        from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

        tokenizer = load_tokenizer(MODEL)
        data = [
            {
                "input_ids": row.ids.tolist(),
                "labels": np.where(row.mask, row.ids, -100).tolist(),
                "length": len(row.ids),
            }
            for row in train
        ]
        from datasets import Dataset

        with tempfile.TemporaryDirectory() as directory:
            trainer = Trainer(
                load_policy(MODEL),
                TrainingArguments(
                    **training_arguments(directory, min(MICRO_BATCH, self.batch), self.batch),
                    train_sampling_strategy="group_by_length",
                ),
                train_dataset=Dataset.from_list(data),
                data_collator=DataCollatorForTokenClassification(tokenizer),
                callbacks=[timer := step_timer()],
            )
            trainer.train()
        return speed(train, timer.seconds)


def training_arguments(directory: str, micro_batch: int, batch: int) -> dict[str, Any]:
    """No logging, saving or evaluation; AdamW fused, clipping at 1, constant learning rate."""
    return {
        "output_dir": directory, "per_device_train_batch_size": micro_batch, "num_train_epochs": 1,
        "gradient_accumulation_steps": batch // micro_batch, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no", "dataloader_drop_last": True,
    }  # fmt: skip


def step_timer() -> Any:
    """A callback whose `seconds` are those from the beginning of training to the end of its last step."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    return Timer()


def speed(train: Sequence[Row], seconds: float) -> Measurement:
    return {"rows/s": len(train) / seconds, "seconds": seconds}


def run(quick: bool) -> Result:
    turns, count = (range(1), BATCH) if quick else (range(3), 4 * BATCH)
    result = Result(
        {
            "batch": f"{BATCH} demonstrations, queries capped at {CAP} tokens, float32, {THREADS} threads, fused AdamW",
            "a turn": f"{count // BATCH} steps; the Trainer's micro-batches are {MICRO_BATCH} rows, grouped by length",
        }
    )
    contestants = {
        "rayrlhf": partial(Child, Ours, count, threads=THREADS),
        "Trainer": partial(Child, Transformers, count, threads=THREADS),
    }
    measured = alternate(contestants, turns)
    own, other = (column(measured[name], "rows/s") for name in contestants)
    result.comparisons.append(Comparison("SFT step", "rows/s", own, other, "transformers.Trainer"))
    return result


if __name__ == "__main__":
    main("sft")
