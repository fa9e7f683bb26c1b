"""Direct preference optimisation: the loop that runs inside Ray Train's workers.

The policy learns from ranked or labelled answers without rollouts and without a reward model. It starts from the SFT
model, which is also the reference policy unless another one is given. The losses are in
`rayrlhf.algorithms.preferences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from actors.pools.remote import fetch
from actors.training.loop import Loop, LoopArguments
from actors.training.pairs import check_pairs, learn_pairs
from rayrlhf.algorithms.preferences import make_preference_loss
from rayrlhf.algorithms.ranked_pass import answer_logprobs, ranked_pass, rows_of
from rayrlhf.algorithms.ranking import Measured
from rayrlhf.data.comparisons import Answers
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import context_length, load_policy, load_tokenizer
from rayrlhf.models.saving import save_model
from rayrlhf.runs.storage import local_copy


@dataclass(frozen=True)
class DPOArguments(LoopArguments):
    """What every worker needs; picklable, paths absolute."""

    policy: str
    """Path or URI of the directory of the model that it starts from."""
    comparisons: Any
    """list[RankedAnswers] or list[LabelledAnswers] (`heldout` ones are only measured), or `actors.pools.remote.put` of
    it."""
    reference: str | None = None
    """Path or URI of the reference policy; None: `policy`."""


def dpo_loop(args: DPOArguments) -> None:
    """Train on judged answers, see `learn_pairs`. The finished policy appears in the run folder's `dpo/`.

    Raises:
        UserError: no pairs to learn from, or rows longer than the model's context.
        FloatingPointError: a gradient or a weight is not finite.
    """
    config, settings = args.config, args.config.dpo
    with Loop("dpo", args) as loop:
        ranks = loop.ranks
        usable: list[Answers] = [c for c in fetch(args.comparisons) if c.teaches]
        start = local_copy(args.policy)
        tokenizer = load_tokenizer(start)
        loss = make_preference_loss(settings, labelled=any(c.labelled for c in usable))
        answers = [row for c in usable for row in rows_of(c)]
        others = loss.extra_rows(usable)
        check_pairs("dpo", usable, [*answers, *others], context_length(start))
        model = loop.trained("policy", load_policy(start, device=ranks.device), config.seed)
        forward_of = partial(
            Forward,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=settings.micro_batch_tokens,
            dtype=config.model.dtype,
        )
        forward = forward_of(model)
        # A restart finds its checkpoint here, so that the note belongs to its step, and loads it in `learn_pairs`.
        # Until then the policy is the model that it starts from, and so the reference where none is given.
        _, state = loop.restore() or (None, None)
        references, others_references = [], np.zeros(len(others))
        if settings.reference:
            loop.note(f"computing log-probs of {len(answers)} answers under the reference policy")
            given = None if args.reference in (None, args.policy) else local_copy(args.reference)
            reference = forward if given is None else forward_of(load_policy(given, device=ranks.device))
            flat = answer_logprobs(reference, [*answers, *others], ranks)
            del reference
            references = np.split(flat[: len(answers)], np.cumsum([len(c.response_ids) for c in usable])[:-1])
            others_references = flat[len(answers) :]

        def measure(chosen: Sequence[int], scale: float | None) -> Measured:
            if others:
                now = answer_logprobs(forward, [others[i] for i in chosen], ranks)
                loss.prepare(now, others_references[chosen])
            known = [references[i] for i in chosen] if settings.reference else None
            return ranked_pass(forward, [usable[i] for i in chosen], ranks, scale, loss, known)

        if learn_pairs(loop, model, usable, settings, measure, state, loss.details):
            stop_tokens = config.data.stop_tokens
            loop.finish(lambda directory: save_model(model, tokenizer, directory, stop_tokens=stop_tokens))
