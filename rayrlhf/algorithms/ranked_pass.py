"""A model's pass over judged answers on all ranks: loss, gradient, margins and scores, and their metrics.

All ranks call a function with the same arguments, each computes its part, and all get the whole result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rayrlhf.algorithms.preferences import PreferenceLoss, RewardModelLoss
from rayrlhf.algorithms.ranking import (
    MARGIN_EDGES,
    JudgedPrompt,
    Measured,
    accuracy_by_confidence,
    margin_histogram,
    ranking_accuracy,
)
from rayrlhf.data.comparisons import Answers
from rayrlhf.data.rows import Row, shard
from rayrlhf.models.forward import Forward
from rayrlhf.models.ranks import Ranks

REWARD_MODEL_LOSS = RewardModelLoss()


def rows_of(comparison: Answers) -> list[Row]:
    """[K] one row for each answer, with the prompt in front."""
    return [Row.completion(comparison.prompt_ids, response) for response in comparison.response_ids]


def ranked_pass(
    forward: Forward,
    comparisons: Sequence[Answers],
    ranks: Ranks,
    scale: float | None = None,
    loss: PreferenceLoss = REWARD_MODEL_LOSS,
    references: Sequence[NDArray[np.float64]] | None = None,
) -> Measured:
    """Loss, margins and scores of `comparisons`, over all ranks.

    Args:
        forward: the model that `loss` scores answers by.
        comparisons: the same on every rank; each `teaches`.
        ranks: each computes a part of the comparisons.
        scale: with it, the gradient of scale * summed loss is added up on each rank's own prompts. Summed over ranks
            it is the gradient of all comparisons, however they were cut. Without it, no gradient is computed.
        loss: a reward model's, or one of the stage `dpo`.
        references: for each comparison the [K] log-probs of its answers under the reference policy, if the loss asks
            for them.
    """
    rows = [rows_of(c) for c in comparisons]
    own = shard([sum(len(row.ids) for row in each) for each in rows], ranks.world)[ranks.rank]
    # A prompt's answers stay together, because pairs of them need each other's scores.
    prompts = [i for i in own for _ in rows[i]]
    flat = None if references is None else np.concatenate([np.zeros(0), *(references[i] for i in own)])
    found_of: dict[int, JudgedPrompt] = {}
    total = 0.0
    for indices, batch in forward.batches([row for i in own for row in rows[i]], groups=prompts):
        chosen = list(dict.fromkeys(prompts[i] for i in indices))  # in the order in which their answers lie
        reference = None if flat is None else torch.tensor(flat[indices], dtype=torch.float32, device=ranks.device)
        with torch.set_grad_enabled(scale is not None):
            found = loss.judge(loss.scores(forward, batch, reference), [comparisons[i] for i in chosen])
        if scale is not None:
            (found.loss * scale).backward()
        total += float(found.loss.detach())
        found_of |= zip(chosen, found.prompts, strict=True)
    # They go back to the order of `comparisons`: callers match them with their pairs.
    gathered = ranks.gather((total, found_of))
    everywhere = {i: part for _, each in gathered for i, part in each.items()}
    parts = [everywhere[i] for i in range(len(comparisons))]
    margins, better, worse = (torch.cat(side) for side in zip(*parts, strict=True))
    mean_loss = sum(summed for summed, _ in gathered) / sum(c.examples for c in comparisons)
    sources = [c.source for c, part in zip(comparisons, parts, strict=True) for _ in part.margins]
    return Measured(mean_loss, margins, better, worse, sources)


def score_rows(forward: Forward, rows: Sequence[Row], ranks: Ranks) -> NDArray[np.float64]:
    """[n] float64 scores of all n rows under a reward model, on every rank, in the order of `rows`."""
    return _shared_out(forward.row_scores, rows, ranks)


def answer_logprobs(forward: Forward, rows: Sequence[Row], ranks: Ranks) -> NDArray[np.float64]:
    """[n] float64 log p(answer | prompt) in nats under a causal language model at temperature 1.

    It is the sum over the predicted tokens of each row, on every rank, in the order of `rows`.
    """
    return _shared_out(lambda own: [float(each.sum()) for each in forward.row_logprobs(own)], rows, ranks)


def summary(measured: Measured, stage: str = "reward_model") -> dict[str, float]:
    """Metrics of held-out comparisons, by name in metrics.jsonl; the names begin with that of the stage.

    They are the loss, the mean margin, a histogram of margins, and the accuracy over all margins, by source (if there
    are several) and by confidence.
    """
    margins = measured.margins
    metrics = {
        f"{stage}/heldout_accuracy": ranking_accuracy(margins),
        f"{stage}/heldout_loss": measured.loss,
        f"{stage}/heldout_margin": float(margins.mean()),
    }
    by_source = defaultdict(list)
    for margin, source in zip(margins, measured.sources, strict=True):
        by_source[source].append(margin)
    if len(by_source) > 1:
        metrics |= {
            f"{stage}/source/{s}/accuracy": ranking_accuracy(torch.stack(each)) for s, each in by_source.items()
        }
    for part in accuracy_by_confidence(margins):
        if part.pairs:
            metrics[f"{stage}/confidence/{part.low:g}-{part.high:g}/accuracy"] = part.accuracy
        metrics[f"{stage}/confidence/{part.low:g}-{part.high:g}/pairs"] = float(part.pairs)
    names = ["-inf", *(f"{edge:g}" for edge in MARGIN_EDGES)]
    histogram = zip(names, margin_histogram(margins), strict=True)
    return metrics | {f"{stage}/margin_from/{name}": float(count) for name, count in histogram}


def _shared_out(
    measure: Callable[[Sequence[Row]], Sequence[float]], rows: Sequence[Row], ranks: Ranks
) -> NDArray[np.float64]:
    """[n] `measure` of all n rows: each rank measures a part of them, and all ranks get all, in the order of `rows`."""
    # Rows with the same prompt go to the same rank, which then computes that prompt once.
    own = shard([len(row.ids) for row in rows], ranks.world, [row.prompt_key for row in rows])[ranks.rank]
    gathered = ranks.gather(dict(zip(own, measure([rows[i] for i in own]), strict=True)))
    everywhere = {i: value for each in gathered for i, value in each.items()}
    return np.array([everywhere[i] for i in range(len(rows))])
