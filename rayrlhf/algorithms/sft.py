"""Supervised fine-tuning: the log-likelihood of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayrlhf.data.rows import Row, shard
from rayrlhf.models.forward import Forward
from rayrlhf.models.ranks import Ranks


def predicted_tokens(rows: Sequence[Row]) -> int:
    """How many tokens the loss of these rows is a sum over."""
    return int(sum(row.mask.sum() for row in rows))


def summed_loss(forward: Forward, rows: Sequence[Row], ranks: Ranks, scale: float | None = None) -> float:
    """-sum of log-probs (nats) over the predicted tokens of all rows, on all ranks together.

    The caller divides by `predicted_tokens` of all rows: every token then counts alike, in whatever row it stands.

    Args:
        forward: a causal language model.
        rows: the same on every rank.
        ranks: each computes a part of the rows.
        scale: with it, the gradient of scale * loss is added up on each rank's own rows. Summed over ranks it is the
            gradient of all rows, however they were cut. Without it, no gradient is computed.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    own = [rows[i] for i in shard([len(row.ids) for row in rows], ranks.world)[ranks.rank]]
    for _, batch in forward.batches(own):
        with torch.set_grad_enabled(scale is not None):
            loss = -forward.logprobs(batch).sum()
        if scale is not None:
            (loss * scale).backward()
        total += loss.detach().double()  # float64: the sum must not depend on the order of micro-batches
    return float(ranks.sum(total))
