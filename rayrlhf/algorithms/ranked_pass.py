"""One pass of a reward model over ranked answers: loss and gradient, margins, scores, and what is reported of them.

Every function is called on all ranks and returns the same on all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rayrlhf.algorithms.ranking import (
    MARGIN_EDGES,
    accuracy_by_confidence,
    flatten_pairs,
    margin_histogram,
    ranking_accuracy,
    ranking_loss,
)
from rayrlhf.config import Config
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.models.attention import packs
from rayrlhf.models.batching import Row, TokenBatch, shard, token_batches
from rayrlhf.models.loading import autocast
from rayrlhf.models.logprobs import sequence_scores, token_logprobs
from rayrlhf.models.ranks import Ranks


class Measured(NamedTuple):
    """What a pass over comparisons found, on all ranks together."""

    loss: float
    """mean over prompts, nats"""
    margins: Tensor
    """[m] score(better) - score(worse) of every pair, CPU float32"""
    sources: list[str]
    """[m] where each pair came from"""


def rows_of(comparison: RankedAnswers) -> list[Row]:
    """[K] the prompt with each of its answers."""
    return [Row.completion(comparison.prompt_ids, response) for response in comparison.response_ids]


def ranked_pass(
    model: PreTrainedModel, comparisons: Sequence[RankedAnswers], pad_token_id: int, config: Config, ranks: Ranks,
    scale: float | None,
) -> Measured:  # fmt: skip
    """Loss and margins of all pairs of `comparisons` (each of which has some), over all ranks.

    With `scale` the gradient of scale * summed loss is added up on each rank's own prompts; summed over ranks it is
    the gradient of the whole batch, however it was cut. Without, no gradient is computed.
    """
    rows = [rows_of(c) for c in comparisons]
    own = shard([sum(len(row.ids) for row in each) for each in rows], ranks.world)[ranks.rank]
    # A prompt's answers stay together, because their pairs need each other's scores.
    prompts = [i for i in own for _ in rows[i]]
    margins: dict[int, list[float]] = {}
    total = 0.0
    for indices, batch in token_batches(
        [row for i in own for row in rows[i]], config.reward_model.micro_batch_tokens, pad_token_id, ranks.device,
        packed=packs(model), groups=prompts,
    ):  # fmt: skip
        chosen = list(dict.fromkeys(prompts[i] for i in indices))
        pairs = flatten_pairs([comparisons[i].pairs for i in chosen], [len(rows[i]) for i in chosen])
        with torch.set_grad_enabled(scale is not None):
            with autocast(ranks.device, config.model.dtype):
                scores = sequence_scores(model, batch)
            found = ranking_loss(scores, pairs.indices.to(ranks.device), pairs.weights.to(ranks.device))
            if scale is not None:
                (found.loss * scale).backward()
        total += float(found.loss.detach())
        split = found.margins.split([len(comparisons[i].pairs) for i in chosen])
        margins |= {i: part.tolist() for i, part in zip(chosen, split, strict=True)}
    gathered = _gather(ranks, (total, margins))
    everywhere = {i: part for _, each in gathered for i, part in each.items()}
    return Measured(
        sum(loss for loss, _ in gathered) / len(comparisons),
        torch.tensor([margin for i in range(len(comparisons)) for margin in everywhere[i]]),
        [c.source for c in comparisons for _ in c.pairs],
    )


def score_rows(
    model: PreTrainedModel, rows: Sequence[Row], pad_token_id: int, config: Config, ranks: Ranks
) -> NDArray[np.float64]:
    """[n] float64 scores of all rows, on every rank, in the order of `rows`."""
    return _row_by_row(model, sequence_scores, rows, pad_token_id, config, ranks)


def answer_logprobs(
    model: PreTrainedModel, rows: Sequence[Row], pad_token_id: int, config: Config, ranks: Ranks
) -> NDArray[np.float64]:
    """[n] float64 log p(answer | prompt) in nats under a causal language model at temperature 1: the sum over the
    predicted tokens of each row, on every rank, in the order of `rows`."""

    def sums(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        return torch.stack([each.sum() for each in token_logprobs(model, batch).split(batch.counts)])

    return _row_by_row(model, sums, rows, pad_token_id, config, ranks)


def summary(measured: Measured) -> dict[str, float]:
    """Metrics of held-out pairs: accuracy (overall, by source, by confidence), loss, margins and their histogram."""
    margins = measured.margins
    metrics = {
        "reward_model/heldout_accuracy": ranking_accuracy(margins),
        "reward_model/heldout_loss": measured.loss,
        "reward_model/heldout_margin": float(margins.mean()),
    }
    by_source = defaultdict(list)
    for margin, source in zip(margins, measured.sources, strict=True):
        by_source[source].append(margin)
    if len(by_source) > 1:
        metrics |= {
            f"reward_model/source/{s}/accuracy": ranking_accuracy(torch.stack(each)) for s, each in by_source.items()
        }
    for part in accuracy_by_confidence(margins):
        if part.pairs:
            metrics[f"reward_model/confidence/{part.low:g}-{part.high:g}/accuracy"] = part.accuracy
        metrics[f"reward_model/confidence/{part.low:g}-{part.high:g}/pairs"] = float(part.pairs)
    names = ["-inf", *(f"{edge:g}" for edge in MARGIN_EDGES)]
    histogram = zip(names, margin_histogram(margins), strict=True)
    return metrics | {f"reward_model/margin_from/{name}": float(count) for name, count in histogram}


def _row_by_row(
    model: PreTrainedModel, measure: Callable[[PreTrainedModel, TokenBatch], Tensor], rows: Sequence[Row],
    pad_token_id: int, config: Config, ranks: Ranks,
) -> NDArray[np.float64]:  # fmt: skip
    """`measure` ([B] of a batch of B rows) of all rows, without gradient, on every rank, in the order of `rows`."""
    own = shard([len(row.ids) for row in rows], ranks.world, [row.prompt_key for row in rows])[ranks.rank]
    values: dict[int, float] = {}
    for indices, batch in token_batches(
        [rows[i] for i in own], config.reward_model.micro_batch_tokens, pad_token_id, ranks.device,
        packed=packs(model),
    ):  # fmt: skip
        with torch.no_grad(), autocast(ranks.device, config.model.dtype):
            found = measure(model, batch)
        values |= dict(zip([own[i] for i in indices], found.tolist(), strict=True))
    everywhere = {i: value for each in _gather(ranks, values) for i, value in each.items()}
    return np.array([everywhere[i] for i in range(len(rows))])


def _gather(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(values, value)
    return values
