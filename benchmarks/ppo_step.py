"""A whole PPO step, ours in one process (`--local`) against TRL 1.12.0's PPOTrainer: samples per second.

Generation, scores, values, KL rewards, advantages, four epochs of updates of policy and value model; ours also sends
the new weights to vLLM. Both sample exactly 48 tokens a response: an end-of-text token ends nothing on either side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Child, Stopwatch, alternate, column, main, median_phases
from benchmarks.results import Comparison, Measurement, Result
from benchmarks.sft import step_timer
from benchmarks.workload import CONTEXT, MODEL, RESPONSE, THREADS, Lengths, draw, lengths_text, write_reward_model
from rayrlhf.config import Config
from rayrlhf.config_resources import GeneratorConfig, ResourcesConfig, ScorerConfig
from rayrlhf.config_rl import KLConfig, PPOConfig, RLConfig
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Sampling

SAMPLES, EPOCHS, TEMPERATURE, LEARNING_RATE = 64, 4, 0.7, 3e-6
OPTIMIZER = OptimizerConfig(lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-5, schedule="constant")
PHASES = ("generate", "score", "experience", "forward and backward", "optimiser", "sync", "rest")


@dataclass(frozen=True)
class Case:
    name: str
    lengths: Lengths
    samples_per_prompt: int
    turns: int
    at_least: float
    trl_micro_batch: int
    """`per_device_train_batch_size`: the best of those tried, see `python -m benchmarks.tune_trl`."""

    @property
    def prompts(self) -> int:
        return SAMPLES // self.samples_per_prompt


CASES = (
    Case("equal lengths, 128-token prompts", "equal", 1, 3, 1.2, 16),
    Case("real lengths, queries capped at 512", "capped", 1, 2, 1.7, 8),
    Case("real lengths, uncapped", "uncapped", 1, 2, 2.2, 8),
    Case("real lengths, four samples a prompt", "uncapped", 4, 2, 6.0, 8),
)


class Ours:
    """Coordinator, generator (vLLM), scorer and learner in this process; with another `rl`, another algorithm's."""

    def __init__(self, case: Case, reward_model: str, epochs: int = EPOCHS, rl: RLConfig | None = None) -> None:
        from actors.pools.remote import Remote
        from actors.rollouts import in_turn
        from actors.rollouts.coordinator import Coordinator
        from actors.rollouts.publisher import Publisher
        from actors.rollouts.scorer import Scorer
        from rayrlhf.algorithms.optimizer import Optimizer
        from rayrlhf.algorithms.registry import make_trainer
        from rayrlhf.algorithms.trainer import Trainer
        from rayrlhf.models.forward import Forward
        from rayrlhf.models.ranks import Ranks

        tokenizer = load_tokenizer(MODEL)
        self.case, self.version, self.steps = case, 0, 0
        # PAD is never sampled, so no response ends before its 48 tokens.
        self.sampling = Sampling(TEMPERATURE, RESPONSE, tokenizer.pad_token_id)
        self.clock = Stopwatch()
        for owner, method, phase in (
            (in_turn, "generate", "generate"), (Scorer, "score", "score"),
            (Trainer, "make_experience", "experience"),
            (Optimizer, "clip", "optimiser"), (Optimizer, "apply", "optimiser"),
        ):  # fmt: skip
            self.clock.around(owner, method, phase)
        config = settings(rl or ppo(case, epochs))
        self.coordinator = Remote.spawn(
            "coordinator", Coordinator, config, MODEL, CONTEXT, tokenizer.pad_token_id, True, local=True
        )
        self.coordinator.call("start_generators", timeout_s=600)
        self.coordinator.call("start_scorers", reward_model, MODEL, timeout_s=600)
        ranks = Ranks(THREADS)
        policy = load_policy(MODEL)
        value_model = load_reward_model(reward_model) if config.rl.critic else None
        tokens, pad = config.rl.micro_batch_tokens, tokenizer.pad_token_id
        forward_of = partial(Forward, pad_token_id=pad, max_tokens=tokens, dtype="float32")
        self.rl = make_trainer(
            config.rl, forward_of(policy), forward_of(value_model) if value_model else None, ranks,
            max_response_tokens=RESPONSE, seed=0,
        )  # fmt: skip
        self.publisher = Publisher(policy, local=True)
        self._publish()
        self._step(warm_up_prompts(case))

    def run(self, turn: int) -> Measurement:
        return self._step(draw(self.case.lengths, self.case.prompts, turn))

    def _step(self, prompts: Sequence[EncodedPrompt]) -> Measurement:
        self.coordinator.call("set_prompts", prompts, self.sampling, timeout_s=600)
        self.clock.take()
        started = time.perf_counter()
        batch = self.coordinator.call("next_batch", self.steps, self.version, timeout_s=600)
        learning = time.perf_counter()
        self.rl.step(batch.trajectories, self.steps)
        syncing = time.perf_counter()
        self._publish()
        ended = time.perf_counter()
        self.steps += 1
        phases = self.clock.take()
        phases["sync"] = ended - syncing
        phases["forward and backward"] = syncing - learning - phases["experience"] - phases["optimiser"]
        tokens = sum(len(t.response_ids) for t in batch.trajectories)
        return finished(ended - started, phases, len(batch.trajectories), tokens)

    def _publish(self) -> None:
        self.version = self.coordinator.call("next_version", self.version, timeout_s=600)
        self.coordinator.call("load_weights", self.publisher.publish(self.version), timeout_s=600)


class TRL:
    """TRL's PPOTrainer with its own loop, sampler, collator and optimiser."""

    def __init__(self, case: Case, reward_model: str, epochs: int = EPOCHS) -> None:
        self.case, self.reward_model, self.epochs = case, reward_model, epochs
        self.policy, self.value_model = load_policy(MODEL), load_reward_model(reward_model)
        self.reference, self.reward = load_policy(MODEL), load_reward_model(reward_model)
        self.clock = Stopwatch()
        self._time_phases()
        self._step(repeated(warm_up_prompts(case), case))

    def run(self, turn: int) -> Measurement:
        return self._step(repeated(draw(self.case.lengths, self.case.prompts, turn), self.case))

    def _time_phases(self) -> None:
        from trl.experimental.ppo import ppo_trainer

        def frozen(model: torch.nn.Module, *_: Any) -> str | None:
            return "score" if model is self.reference else None  # the policy's is part of forward and backward

        def scored(model: torch.nn.Module, *_: Any) -> str:
            return "experience" if model is self.value_model else "score"

        self.clock.around(ppo_trainer, "batch_generation", "generate")
        self.clock.around(ppo_trainer, "forward", frozen)
        self.clock.around(ppo_trainer, "get_reward", scored)

    def _step(self, prompts: Sequence[EncodedPrompt]) -> Measurement:
        from datasets import Dataset
        from trl.experimental.ppo import PPOConfig as TRLConfig
        from trl.experimental.ppo import PPOTrainer

        tokenizer = load_tokenizer(MODEL)
        tokenizer.padding_side = "left"
        with tempfile.TemporaryDirectory() as directory:
            trainer = PPOTrainer(
                args=TRLConfig(
                    output_dir=directory,
                    per_device_train_batch_size=self.case.trl_micro_batch,
                    gradient_accumulation_steps=SAMPLES // self.case.trl_micro_batch,
                    local_rollout_forward_batch_size=SAMPLES,
                    total_episodes=SAMPLES,
                    num_ppo_epochs=self.epochs,
                    num_mini_batches=1,
                    response_length=RESPONSE,
                    temperature=TEMPERATURE,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="constant",
                    optim="adamw_torch_fused",
                    adam_epsilon=1e-5,
                    kl_coef=0.05,
                    num_sample_generations=0,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    bf16=False,
                    use_cpu=True,
                    gradient_checkpointing=False,
                ),
                processing_class=tokenizer,
                model=self.policy,
                ref_model=self.reference,
                reward_model=self.reward,
                value_model=self.value_model,
                train_dataset=Dataset.from_dict({"input_ids": [list(prompt.ids) for prompt in prompts]}),
                callbacks=[timer := step_timer()],
            )
            # The only batch is also the dataset's last, after every part of which accelerate would take a step.
            trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
            self.clock.around(trainer.optimizer.optimizer, "step", "optimiser")
            self.clock.take()
            trainer.train()
        seconds, phases = timer.seconds, self.clock.take()
        phases["forward and backward"] = seconds - sum(phases.values())  # with GAE and metrics, which take no time
        return finished(seconds, phases, SAMPLES, SAMPLES * RESPONSE)


def ppo(case: Case, epochs: int) -> PPOConfig:
    """What is measured, in the words of a config file."""
    return PPOConfig(
        prompts_per_step=case.prompts, samples_per_prompt=case.samples_per_prompt, epochs=epochs, minibatches=1,
        temperature=TEMPERATURE, optimizer=OPTIMIZER, missing_eos_reward=None, kl=KLConfig(coefficient=0.05),
    )  # fmt: skip


def settings(rl: RLConfig) -> Config:
    """The run in which `rl` is measured."""
    generators = GeneratorConfig(threads=THREADS, max_num_seqs=SAMPLES)
    return Config(
        name="benchmark",
        rl=rl,  # type: ignore[arg-type]
        resources=ResourcesConfig(generators=generators, scorers=ScorerConfig(threads=THREADS)),
    )


def warm_up_prompts(case: Case) -> list[EncodedPrompt]:
    return [EncodedPrompt(f"warm-up-{i}", prompt.ids[:8]) for i, prompt in enumerate(draw("equal", case.prompts, 99))]


def repeated(prompts: Sequence[EncodedPrompt], case: Case) -> list[EncodedPrompt]:
    """TRL has no notion of several samples of a prompt: it gets the prompt several times."""
    return [prompt for prompt in prompts for _ in range(case.samples_per_prompt)]


def finished(seconds: float, phases: Measurement, samples: int, tokens: int) -> Measurement:
    rest = seconds - sum(phases.values())
    measured = {"seconds": seconds, "samples/s": samples / seconds, "response tokens": float(tokens)}
    return measured | phases | {"rest": rest}


def run(quick: bool) -> Result:
    result = Result(
        {
            "step": f"{SAMPLES} samples of {RESPONSE} tokens, {EPOCHS} epochs, 1 mini-batch, float32, "
            f"{THREADS} threads, temperature {TEMPERATURE}, AdamW (fused), separate value network",
            "prompts": "embedded TL;DR; every turn draws others, the same for both",
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        reward_model = write_reward_model(Path(directory) / "reward_model")
        for case in CASES[-1:] if quick else CASES:
            turns, epochs = (1, 1) if quick else (case.turns, EPOCHS)
            print(f"{case.name}: {lengths_text(case.lengths, case.prompts, turns)}", flush=True)
            contestants = {
                "rayrlhf": partial(Child, Ours, case, reward_model, epochs, threads=THREADS),
                "TRL": partial(Child, TRL, case, reward_model, epochs, threads=THREADS),
            }
            measured = alternate(contestants, range(turns))
            own, other = (column(measured[name], "samples/s") for name in contestants)
            result.comparisons.append(
                Comparison(case.name, "samples/s", own, other, "TRL 1.12.0 PPOTrainer", at_least=case.at_least)
            )
            result.settings[case.name] = (
                f"{lengths_text(case.lengths, case.prompts, turns)}; TRL's micro-batches: {case.trl_micro_batch} rows"
            )
            result.phases[case.name] = {name: median_phases(each, PHASES) for name, each in measured.items()}
    return result


if __name__ == "__main__":
    main("ppo_step")
