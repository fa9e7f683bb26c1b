"""The reward model: the loop that runs inside Ray Train's workers.

    { global batch of prompts with all their answers, ranking loss over all pairs, AdamW } per step

It starts from the SFT model with a fresh scalar head (Stiennon et al. 2020) and ends with a bias under which people's
reference answers score 0 on average. At last its accuracy on held-out pairs is measured, beside trivial baselines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.pools.remote import fetch
from actors.training.loop import Loop, LoopArguments
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.algorithms.ranked_pass import Measured, answer_logprobs, ranked_pass, rows_of, score_rows, summary
from rayrlhf.algorithms.ranking import ranking_accuracy
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.epochs import Epochs
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import context_length, load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.lora import load_trained_state, trained_state
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import save_model
from rayrlhf.reports.reward_accuracy import heldout_pairs, write_accuracy
from rayrlhf.runs.storage import local_copy

EVALS_PER_EPOCH = 4
"""Held-out accuracy and a checkpoint so often."""


@dataclass(frozen=True)
class RewardModelArguments(LoopArguments):
    """What every worker needs; picklable, paths absolute."""

    model: str
    """Path or URI of the SFT model's directory."""
    comparisons: Any
    """list[RankedAnswers] (`heldout` ones are only measured), or `actors.pools.remote.put` of it."""
    references: Any
    """list[Row] of prompts with people's own answers, which will score 0 on average; or `put` of it."""


def reward_model_loop(args: RewardModelArguments) -> None:
    """Train on ranked answers.

    A restart continues from the last of `EVALS_PER_EPOCH` checkpoints an epoch. The finished model, with its
    `reward_bias`, appears in the run folder's `reward_model/`; its accuracy on held-out pairs, if there are any, in
    `reward_model.json`.

    Raises:
        UserError: no pairs to learn from, no reference answers, or rows longer than the model's context.
        FloatingPointError: a gradient or a weight is not finite.
    """
    config, settings = args.config, args.config.reward_model
    with Loop("reward_model", args) as loop:
        run, ranks = loop.run, loop.ranks
        usable: list[RankedAnswers] = [c for c in fetch(args.comparisons) if c.pairs]
        train, heldout = [c for c in usable if not c.heldout], [c for c in usable if c.heldout]
        references: list[Row] = fetch(args.references)
        sft = local_copy(args.model)
        tokenizer = load_tokenizer(sft)
        _check(train, [*references, *(row for c in usable for row in rows_of(c))], references, context_length(sft))
        # First, and the SFT model is gone before the reward model and its optimiser take their memory.
        forward_of = partial(
            Forward,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=settings.micro_batch_tokens,
            dtype=config.model.dtype,
        )
        sft_logprobs = None
        if heldout:
            sft_logprobs = _sft_logprobs(forward_of(load_policy(sft, device=ranks.device)), heldout, ranks)
        model = load_reward_model(sft, device=ranks.device, fresh_head_seed=config.seed)
        loop.trained("reward model", model, config.seed)
        model.config.reward_bias = 0.0
        forward = forward_of(model)

        epochs = Epochs(len(train), settings.prompts_per_batch, settings.epochs, EVALS_PER_EPOCH, config.seed)
        optimizer = Optimizer(model, settings.optimizer, epochs.steps)
        if found := loop.restore():
            _, state = found
            load_trained_state(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])

        def measure(comparisons: Sequence[RankedAnswers], scale: float | None = None) -> Measured:
            return ranked_pass(forward, comparisons, ranks, scale)

        def heldout_metrics() -> dict[str, float]:
            return summary(measure(heldout)) if heldout else {}

        loop.steps = epochs.steps
        if loop.step == 0:
            counts = {
                "prompts": len(train), "pairs": sum(len(c.pairs) for c in train),
                "heldout prompts": len(heldout), "heldout pairs": sum(len(c.pairs) for c in heldout),
            }  # fmt: skip
            loop.note(", ".join(f"{count} {words}" for words, count in counts.items()))
            sizes = {f"reward_model/{words.replace(' ', '_')}": count for words, count in counts.items()}
            loop.log({**sizes, **heldout_metrics()})
        while loop.step < epochs.steps:
            started = time.perf_counter()
            batch = [train[i] for i in epochs.batch(loop.step)]
            lr = optimizer.lr
            measured = measure(batch, scale=1.0 / len(batch))
            norm = optimizer.step(ranks)
            evaluate = epochs.evaluates_after(loop.step)
            loop.step += 1
            seconds = time.perf_counter() - started
            loop.log({
                "reward_model/loss": measured.loss, "reward_model/accuracy": ranking_accuracy(measured.margins),
                "reward_model/margin": float(measured.margins.mean()), "reward_model/lr": lr,
                "reward_model/grad_norm": norm, "time/step": seconds,
                "throughput/tokens_per_s": sum(len(row.ids) for c in batch for row in rows_of(c)) / seconds,
                "memory/learner_peak_mib": ranks.peak_memory_mib(),
            })  # fmt: skip
            if evaluate:
                loop.log(heldout_metrics())
                loop.save({"model": trained_state(model), "optimizer": optimizer.state_dict()})
        loop.require_finite()  # before the scores of such a model are called its bias and its accuracy
        bias = -float(score_rows(forward, references, ranks).mean())
        loop.log({"reward_model/reward_bias": bias})
        final = measure(heldout) if heldout else None
        if ranks.first:
            for stale in (run.reward_accuracy, run.heldout_pairs):
                stale.unlink(missing_ok=True)
            if final and sft_logprobs is not None:
                pairs = heldout_pairs(heldout, final.margins, sft_logprobs)
                samples = config.evaluate.bootstrap_samples
                write_accuracy(run.heldout_pairs, run.reward_accuracy, pairs, summary(final), samples, config.seed)
            run.upload(run.heldout_pairs, run.reward_accuracy)
        loop.finish(lambda directory: save_model(model, tokenizer, directory, reward_bias=bias))


def _sft_logprobs(forward: Forward, comparisons: Sequence[RankedAnswers], ranks: Ranks) -> NDArray[np.float64]:
    """[n] log-prob of every answer, in order, under the model that training starts from."""
    return answer_logprobs(forward, [row for c in comparisons for row in rows_of(c)], ranks)


def _check(train: Sequence[RankedAnswers], rows: Sequence[Row], references: Sequence[Row], context: int) -> None:
    if not train:
        raise UserError("reward_model: no comparison with a preference to train on; collect more prompts or answers")
    if not references:
        raise UserError("reward_model: no reference answers to set the score's zero by; give demonstrations")
    longest = max(len(row.ids) for row in rows)
    if longest > context:
        raise UserError(
            f"reward_model: the longest prompt with answer has {longest} tokens and the model's context is {context}; "
            "lower data.max_prompt_tokens or data.max_response_tokens"
        )
