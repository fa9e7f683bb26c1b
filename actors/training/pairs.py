"""Training on judged answers, for the reward model and for `dpo`: the loop over their batches.

{ global batch of prompts with all their answers, loss over all pairs or labels, AdamW } per step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from actors.training.loop import Loop
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.algorithms.ranked_pass import rows_of, summary
from rayrlhf.algorithms.ranking import Measured
from rayrlhf.config import RewardModelConfig
from rayrlhf.config_dpo import PreferenceConfig
from rayrlhf.data.comparisons import Answers
from rayrlhf.data.epochs import Epochs
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.lora import load_trained_state, trained_state

EVALS_PER_EPOCH = 4
"""Held-out accuracy and a checkpoint so often."""
Measure = Callable[[Sequence[int], float | None], Measured]
"""`ranked_pass` over the comparisons at these places of the list, with the argument `scale`."""


def learn_pairs(
    loop: Loop,
    model: PreTrainedModel,
    comparisons: Sequence[Answers],
    settings: RewardModelConfig | PreferenceConfig,
    measure: Measure,
    state: Mapping[str, Any] | None,
    details: Callable[[Measured], Mapping[str, float]],
) -> bool:
    """Train for all epochs. A restart continues from the last of `EVALS_PER_EPOCH` checkpoints an epoch.

    Returns whether it did: not if the loop was asked to stop, which leaves a checkpoint of that step.

    Args:
        loop: of a stage whose name the metrics begin with.
        model: the one that `measure` runs.
        comparisons: those that are not `heldout` are trained on, the others are only measured.
        settings: of the stage.
        measure: computes loss and margins of comparisons, and their gradient if it is given a scale.
        state: of the checkpoint to continue from, as `Loop.restore` gives it.
        details: the loss's own metrics of what was measured last, see `PreferenceLoss.details`.

    Raises:
        FloatingPointError: a gradient or a weight is not finite.
    """
    stage, ranks = loop.stage, loop.ranks
    train, heldout = ([i for i, c in enumerate(comparisons) if c.heldout is kept] for kept in (False, True))
    epochs = Epochs(len(train), settings.prompts_per_batch, settings.epochs, EVALS_PER_EPOCH, loop.config.seed)
    optimizer = Optimizer(model, settings.optimizer, epochs.steps)
    if state:
        load_trained_state(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def heldout_metrics() -> dict[str, float]:
        if not heldout:
            return {}
        found = measure(heldout, None)
        return summary(found, stage) | {f"{stage}/heldout_{name}": value for name, value in details(found).items()}

    loop.steps = epochs.steps
    if loop.step == 0:
        counts: dict[str, int] = {}
        for part, chosen in (("", train), ("heldout ", heldout)):
            counts[f"{part}prompts"] = len(chosen)
            for words in comparisons[0].counts:
                counts[f"{part}{words}"] = sum(comparisons[i].counts[words] for i in chosen)
        loop.note(", ".join(f"{count} {words}" for words, count in counts.items()))
        sizes = {f"{stage}/{words.replace(' ', '_')}": count for words, count in counts.items()}
        loop.log({**sizes, **heldout_metrics()})
    while loop.step < epochs.steps:
        started = time.perf_counter()
        batch = [train[i] for i in epochs.batch(loop.step)]
        lr = optimizer.lr
        measured = measure(batch, 1.0 / sum(comparisons[i].examples for i in batch))
        norm = optimizer.step(ranks)
        evaluate = epochs.evaluates_after(loop.step)
        loop.step += 1
        seconds = time.perf_counter() - started
        loop.log({
            f"{stage}/loss": measured.loss, **{f"{stage}/{name}": value for name, value in details(measured).items()},
            f"{stage}/lr": lr, f"{stage}/grad_norm": norm, "time/step": seconds,
            "throughput/tokens_per_s": sum(len(row.ids) for i in batch for row in rows_of(comparisons[i])) / seconds,
            "memory/learner_peak_mib": ranks.peak_memory_mib(),
        })  # fmt: skip
        if evaluate:
            loop.log(heldout_metrics())
        stopping = loop.stopping()
        if evaluate or stopping:
            loop.save({"model": trained_state(model), "optimizer": optimizer.state_dict()})
        if stopping:
            return False
    return True


def check_pairs(stage: str, comparisons: Sequence[Answers], rows: Sequence[Row], context: int) -> None:
    """
    Raises:
        UserError: no pairs to learn from, or one of `rows` is longer than the model's context.
    """
    if all(c.heldout for c in comparisons):
        raise UserError(f"{stage}: no comparison with a preference to train on; collect more prompts or answers")
    longest = max(len(row.ids) for row in rows)
    if longest > context:
        raise UserError(
            f"{stage}: the longest prompt with answer has {longest} tokens and the model's context is {context}; "
            "lower data.max_prompt_tokens or data.max_response_tokens"
        )
