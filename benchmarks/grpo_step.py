"""A whole GRPO step, ours in one process (`--local`) against TRL 1.12.0's GRPOTrainer: samples per second.

Generation, scores of a reward model, reference log-probs, advantages, one update with k3 in the loss; ours also sends
the new weights to vLLM. Both sample exactly 48 tokens a response: an end-of-text token ends nothing on either side.
TRL samples with transformers, as it does unless a vLLM server is set up beside it on a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Child, alternate, column, main
from benchmarks.ppo_step import (
    LEARNING_RATE,
    OPTIMIZER,
    SAMPLES,
    TEMPERATURE,
    Case,
    Ours,
    finished,
    repeated,
    warm_up_prompts,
)  # fmt: skip
from benchmarks.results import Comparison, Measurement, Result
from benchmarks.sft import step_timer
from benchmarks.workload import MODEL, RESPONSE, THREADS, draw, lengths_text, write_reward_model
from rayrlhf.config_rl import GRPOConfig
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer

CASES = (Case("GRPO step, real lengths, eight samples a prompt", "uncapped", 8, 2, 5.0, 16),)


def grpo(case: Case) -> GRPOConfig:
    """What is measured, in the words of a config file."""
    return GRPOConfig(
        prompts_per_step=case.prompts, samples_per_prompt=case.samples_per_prompt, temperature=TEMPERATURE,
        optimizer=OPTIMIZER, missing_eos_reward=None,
    )  # fmt: skip


class TRL:
    """TRL's GRPOTrainer with its own loop, sampler, collator and optimiser; the prompts are given as token ids."""

    def __init__(self, case: Case, reward_model: str) -> None:
        self.case = case
        self.policy, self.reward = load_policy(MODEL), load_reward_model(reward_model)
        self._step(repeated(warm_up_prompts(case), case))

    def run(self, turn: int) -> Measurement:
        return self._step(repeated(draw(self.case.lengths, self.case.prompts, turn), self.case))

    def _step(self, prompts: Sequence[EncodedPrompt]) -> Measurement:
        from datasets import Dataset
        from trl import import_utils

        # TRL 1.12 knows vLLM up to 0.27, and its GRPO fails to import beside a newer one.
        import_utils.is_vllm_available = lambda min_version=None: False
        from trl import GRPOConfig as TRLConfig
        from trl import GRPOTrainer

        tokenizer = load_tokenizer(MODEL)
        different = list({prompt.id: prompt for prompt in prompts}.values())
        with tempfile.TemporaryDirectory() as directory:
            trainer = GRPOTrainer(
                self.policy,
                reward_funcs=self.reward,
                reward_processing_classes=load_tokenizer(MODEL),
                args=TRLConfig(
                    output_dir=directory,
                    per_device_train_batch_size=self.case.trl_micro_batch,
                    gradient_accumulation_steps=SAMPLES // self.case.trl_micro_batch,
                    num_generations=self.case.samples_per_prompt,
                    max_completion_length=RESPONSE,
                    max_steps=1,
                    temperature=TEMPERATURE,
                    # PAD is never sampled, so no response ends before its 48 tokens.
                    generation_kwargs={"eos_token_id": tokenizer.pad_token_id},
                    beta=0.04,
                    loss_type="grpo",
                    use_bias_correction_kl=False,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="constant",
                    optim="adamw_torch_fused",
                    adam_epsilon=1e-5,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    bf16=False,
                    use_cpu=True,
                    gradient_checkpointing=False,
                    shuffle_dataset=False,
                ),
                processing_class=tokenizer,
                train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(different))]}),
                callbacks=[timer := step_timer()],
            )
            trainer._tokenize_prompts = lambda which: ([list(different[int(i)].ids) for i in which], None, {})
            trainer.train()
        return finished(timer.seconds, {}, SAMPLES, SAMPLES * RESPONSE)


def run(quick: bool) -> Result:
    result = Result(
        {
            "step": f"{SAMPLES} samples of {RESPONSE} tokens, 1 epoch, 1 mini-batch, k3 in the loss, float32, "
            f"{THREADS} threads, temperature {TEMPERATURE}, AdamW (fused), a reward model",
            "prompts": "embedded TL;DR; every turn draws others, the same for both",
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        reward_model = write_reward_model(Path(directory) / "reward_model")
        for case in CASES:
            turns = 1 if quick else case.turns
            about = lengths_text(case.lengths, case.prompts, turns)
            print(f"{case.name}: {about}", flush=True)
            contestants = {
                "rayrlhf": partial(Child, Ours, case, reward_model, 1, grpo(case), threads=THREADS),
                "TRL": partial(Child, TRL, case, reward_model, threads=THREADS),
            }
            measured = alternate(contestants, range(turns))
            own, other = (column(measured[name], "samples/s") for name in contestants)
            result.comparisons.append(
                Comparison(case.name, "samples/s", own, other, "TRL 1.12.0 GRPOTrainer", at_least=case.at_least)
            )
            result.settings[case.name] = f"{about}; TRL's micro-batches: {case.trl_micro_batch} rows"
    return result


if __name__ == "__main__":
    main("grpo_step")
