"""DPO steps against TRL's DPOTrainer: the same pairs, batch and optimiser, the reference policy's log-probs included.

Ours is the stage's own loop (`actors.training.dpo` in this process). Its time is that of its steps and of the pass that
computes the reference log-probs before them; DPOTrainer computes them in each step, as is its default.
A prompt has two answers, or four: then ours computes four rows for its six pairs, and DPOTrainer twelve.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.harness import Child, alternate, column, main
from benchmarks.results import Comparison, Measurement, Result
from benchmarks.reward_model import MICRO_BATCH, PROMPTS, Contestant, speed
from benchmarks.sft import LEARNING_RATE, step_timer, training_arguments
from benchmarks.workload import CAP, MODEL, THREADS
from rayrlhf.config import Config
from rayrlhf.config_dpo import DPOConfig
from rayrlhf.config_resources import LearnerConfig, ResourcesConfig
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.models.loading import load_policy, load_tokenizer
from rayrlhf.sections import OptimizerConfig


class Ours(Contestant):
    def _train(self, train: Sequence[RankedAnswers]) -> Measurement:
        from actors.training import dpo
        from rayrlhf.algorithms.ranked_pass import answer_logprobs
        from rayrlhf.runs.metrics import read_metrics

        passes: list[float] = []

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = answer_logprobs(*arguments)
            passes.append(time.perf_counter() - started)
            return found

        optimizer = OptimizerConfig(lr=LEARNING_RATE, schedule="constant")
        with tempfile.TemporaryDirectory() as directory, patch.object(dpo, "answer_logprobs", timed):
            config = Config(
                name="dpo", runs_dir=directory, resources=ResourcesConfig(learner=LearnerConfig(threads=THREADS)),
                dpo=DPOConfig(prompts_per_batch=self.batch, optimizer=optimizer),
            )  # fmt: skip
            dpo.dpo_loop(dpo.DPOArguments(config, directory, "dpo", 1, MODEL, list(train)))
            steps = [r["time/step"] for r in read_metrics(Path(directory)) if "time/step" in r]
        assert len(passes) == 1
        return speed(train, sum(steps) + sum(passes))


class TRL(Contestant):
    def _train(self, train: Sequence[RankedAnswers]) -> Measurement:
        from datasets import Dataset
        from trl import DPOConfig as TRLConfig
        from trl import DPOTrainer

        class Tokenised(DPOTrainer):
            """Takes token ids as they are."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset.remove_columns(["prompt", "chosen", "rejected"])

        pairs = [
            {
                "prompt": "", "chosen": "", "rejected": "", "prompt_ids": list(c.prompt_ids),
                "chosen_ids": list(c.response_ids[better]), "rejected_ids": list(c.response_ids[worse]),
            }
            for c in train
            for better, worse in c.pairs
        ]  # fmt: skip
        batch = self.batch * len(train[0].pairs)
        with tempfile.TemporaryDirectory() as directory:
            trainer = Tokenised(
                load_policy(MODEL),
                load_policy(MODEL),
                TRLConfig(**training_arguments(directory, min(MICRO_BATCH, batch), batch), max_length=None),
                train_dataset=Dataset.from_list(pairs),
                processing_class=load_tokenizer(MODEL),
                callbacks=[timer := step_timer()],
            )
            trainer.train()
        return speed(train, timer.seconds)


@dataclass(frozen=True)
class Case:
    name: str
    answers: int
    turns: int
    steps: int
    """Of a turn: a step of DPOTrainer on six pairs a prompt takes more than a minute on two cores."""


CASES = (Case("DPO step, 2 answers a prompt", 2, 3, 3), Case("DPO step, 4 answers a prompt", 4, 2, 1))


def run(quick: bool) -> Result:
    result = Result(
        {
            "batch": f"{PROMPTS} prompts capped at {CAP} tokens, float32, {THREADS} threads, AdamW (fused), beta 0.1",
            "DPOTrainer": f"its micro-batches are {MICRO_BATCH} pairs",
        }
    )
    for case in CASES[:1] if quick else CASES:
        turns, steps = (1, 1) if quick else (case.turns, case.steps)
        contestants = {
            "rayrlhf": partial(Child, Ours, steps * PROMPTS, case.answers, threads=THREADS),
            "TRL": partial(Child, TRL, steps * PROMPTS, case.answers, threads=THREADS),
        }
        measured = alternate(contestants, range(turns))
        own, other = (column(measured[name], "prompts/s") for name in contestants)
        result.comparisons.append(Comparison(case.name, "prompts/s", own, other, "TRL 1.12.0 DPOTrainer", at_least=2.5))
        result.settings[case.name] = f"{turns} turns of {steps} steps"
    return result


if __name__ == "__main__":
    main("dpo")
