"""The reward model: the loop that runs inside Ray Train's workers.

It starts from the SFT model with a fresh scalar head (Stiennon et al. 2020), or from a model that is given. It ends
with a bias under which people's reference answers score 0 on average. At last its accuracy on held-out pairs is
measured, beside trivial baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.pools.remote import fetch
from actors.training.loop import Loop, LoopArguments
from actors.training.pairs import check_pairs, learn_pairs
from rayrlhf.algorithms.ranked_pass import (
    REWARD_MODEL_LOSS,
    answer_logprobs,
    ranked_pass,
    rows_of,
    score_rows,
    summary,
)
from rayrlhf.algorithms.ranking import Measured
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import context_length, load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.saving import save_model
from rayrlhf.reports.reward_accuracy import heldout_pairs, minus_length, write_accuracy
from rayrlhf.runs.storage import local_copy


@dataclass(frozen=True)
class RewardModelArguments(LoopArguments):
    """What every worker needs; picklable, paths absolute."""

    model: str
    """What it starts from: a directory, a URI or a hub name. A model without a scalar head gets a new one."""
    comparisons: Any
    """list[RankedAnswers] (`heldout` ones are only measured), or `actors.pools.remote.put` of it."""
    references: Any
    """list[Row] of prompts with people's own answers, which will score 0 on average; or `put` of it."""
    sft: str | None = None
    """The SFT model, whose log-probs of the held-out answers stand beside the reward model's; None: there is none."""


def reward_model_loop(args: RewardModelArguments) -> None:
    """Train on ranked answers, see `learn_pairs`.

    The finished model, with its `reward_bias`, appears in the run folder's `reward_model/`; its accuracy on held-out
    pairs, if there are any, in `reward_model.json`.

    Raises:
        UserError: no pairs to learn from, no reference answers, or rows longer than the model's context.
        FloatingPointError: a gradient or a weight is not finite.
    """
    config, settings = args.config, args.config.reward_model
    with Loop("reward_model", args) as loop:
        run, ranks = loop.run, loop.ranks
        usable: list[RankedAnswers] = [c for c in fetch(args.comparisons) if c.pairs]
        heldout = [i for i, c in enumerate(usable) if c.heldout]
        references: list[Row] = fetch(args.references)
        start = local_copy(args.model)
        tokenizer = load_tokenizer(start)
        rows = [*references, *(row for c in usable for row in rows_of(c))]
        check_pairs("reward_model", usable, rows, context_length(start))
        if not references:
            raise UserError("reward_model: no reference answers to set the score's zero by; give demonstrations")
        # First, and the SFT model is gone before the reward model and its optimiser take their memory.
        forward_of = partial(
            Forward,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=settings.micro_batch_tokens,
            dtype=config.model.dtype,
        )
        sft_logprobs = None
        if heldout and args.sft is not None:
            answers = [row for i in heldout for row in rows_of(usable[i])]
            sft_logprobs = answer_logprobs(
                forward_of(load_policy(local_copy(args.sft), device=ranks.device)), answers, ranks
            )
        model = load_reward_model(start, device=ranks.device, fresh_head_seed=config.seed)
        loop.trained("reward model", model, config.seed)
        model.config.reward_bias = 0.0
        forward = forward_of(model)

        def measure(chosen: Sequence[int], scale: float | None) -> Measured:
            return ranked_pass(forward, [usable[i] for i in chosen], ranks, scale)

        _, state = loop.restore() or (None, None)
        if not learn_pairs(loop, model, usable, settings, measure, state, REWARD_MODEL_LOSS.details):
            return
        loop.require_finite()  # before the scores of such a model are called its bias and its accuracy
        bias = -float(score_rows(forward, references, ranks).mean())
        loop.log({"reward_model/reward_bias": bias})
        final = measure(heldout, None) if heldout else None
        if ranks.first:
            for stale in (run.reward_accuracy, run.heldout_pairs):
                stale.unlink(missing_ok=True)
            if final:
                pairs = heldout_pairs([usable[i] for i in heldout], final.margins, sft_logprobs)
                samples = config.evaluate.bootstrap_samples
                written = write_accuracy(
                    run.heldout_pairs, run.reward_accuracy, pairs, summary(final), samples, config.seed
                )
                loop.log({"reward_model/minus_length": minus_length(written)})
            run.upload(run.heldout_pairs, run.reward_accuracy)
        loop.finish(lambda directory: save_model(model, tokenizer, directory, reward_bias=bias))
