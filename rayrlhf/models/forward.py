"""One model over many rows: cut into micro-batches, computed in the asked precision, results back in order.

Everything that runs a model goes through `Forward`: the scorers, and the updates of SFT, reward model and RL.
So all of them cut rows alike, use the same precision, and meet the model through one module, `RootModule`.

    forward = Forward(model, pad_token_id=1, max_tokens=4096, dtype="bfloat16")
    forward.row_scores(rows)                          # a whole pass without gradient, in the order of `rows`
    for indices, batch in forward.batches(rows):      # an update: one backward pass for each micro-batch
        (-forward.logprobs(batch).sum()).backward()   # `indices` says which rows these are
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayrlhf.data.rows import Row
from rayrlhf.models.attention import packs
from rayrlhf.models.batching import TokenBatch, token_batches
from rayrlhf.models.logprobs import (
    TokenLogprobs,
    sequence_scores,
    token_logprobs,
    token_logprobs_and_entropy,
    token_values,
)

T = TypeVar("T")


class RootModule(nn.Module):
    """A thin wrapper whose methods are all the ways in which a model is computed.

    It has no parameters of its own: what is saved and optimised is `model`, whose names and order do not change.

    The methods are here for the sake of a sharded model. FSDP2 gathers a module's parameters in a hook of its forward
    method. Log-probs never call the forward method of the language model: they call its base model and then its output
    head, whose weight may be tied to the embedding. The head would then meet parameters that nobody has gathered
    ("got mixed torch.Tensor and DTensor"). With `fully_shard(root)` and
    `register_fsdp_forward_method(root, name)` for each of `METHODS`, every way in has the hook.
    """

    METHODS = ("logprobs", "logprobs_and_entropy", "values", "scores")

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def logprobs(self, batch: TokenBatch, temperature: float) -> Tensor:
        """See `token_logprobs`."""
        return token_logprobs(self.model, batch, temperature)

    def logprobs_and_entropy(self, batch: TokenBatch, temperature: float) -> TokenLogprobs:
        """See `token_logprobs_and_entropy`."""
        return token_logprobs_and_entropy(self.model, batch, temperature)

    def values(self, batch: TokenBatch) -> Tensor:
        """See `token_values`."""
        return token_values(self.model, batch)

    def scores(self, batch: TokenBatch) -> Tensor:
        """See `sequence_scores`."""
        return sequence_scores(self.model, batch)


class Forward:
    """A model, and how rows are run through it.

    The methods that take a `TokenBatch` record a gradient if the caller's context does (`torch.set_grad_enabled`).
    Those that take rows never do.
    """

    def __init__(self, model: PreTrainedModel, *, pad_token_id: int, max_tokens: int, dtype: str) -> None:
        """The model stays where it is.

        Args:
            model: a causal language model for log-probs, a model with a scalar `score` head for values and scores.
            pad_token_id: fills rectangles, where the model cannot compute packed rows.
            max_tokens: most tokens of a micro-batch, padding included; a longer row has one of its own.
            dtype: "bfloat16" computes under autocast, "float32" as the weights are.
        """
        self.model, self.root = model, RootModule(model)
        self.pad_token_id, self.max_tokens, self.dtype = pad_token_id, max_tokens, dtype
        self.packed = packs(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def batches(
        self, rows: Sequence[Row], groups: Sequence[Hashable] | None = None, beside: Sequence[Forward] = ()
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        """Cut rows into micro-batches; yields the indices of each one's rows, and the batch of them.

        Args:
            rows: in any order; similar lengths are put together, so the batches come in an order of their own.
            groups: the group of each row. Rows of one group, which have the same prompt, stay in one batch.
            beside: other models that compute the same batches. A batch is packed only if all models can do that.
        """
        # Ranks may have different numbers of micro-batches: each computes alone, and gradients meet at the end of the
        # step. A sharded model gathers its layers in every pass, so ranks would have to agree on a number here, and
        # those with fewer rows would add batches without rows.
        packed = all(forward.packed for forward in (self, *beside))
        return token_batches(rows, self.max_tokens, self.pad_token_id, self.device, packed=packed, groups=groups)

    def logprobs(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        """[N] float32 log pi(token | what precedes it) of the predicted tokens, in nats, at `temperature`."""
        with autocast(self.device, self.dtype):
            return self.root.logprobs(batch, temperature)

    def logprobs_and_entropy(self, batch: TokenBatch, temperature: float = 1.0) -> TokenLogprobs:
        """`logprobs` and the entropy of each token's distribution, both [N] float32 in nats and without gradient."""
        with autocast(self.device, self.dtype):
            return self.root.logprobs_and_entropy(batch, temperature)

    def values(self, batch: TokenBatch) -> Tensor:
        """[N] float32 value of the state in which each predicted token was chosen."""
        with autocast(self.device, self.dtype):
            return self.root.values(batch)

    def scores(self, batch: TokenBatch) -> Tensor:
        """[B] float32 score of each row, read at its last token."""
        with autocast(self.device, self.dtype):
            return self.root.scores(batch)

    def row_logprobs(self, rows: Sequence[Row], temperature: float = 1.0) -> list[Tensor]:
        """For each row the [R] float32 log-probs of its R predicted tokens, without gradient."""
        return self.each_row(rows, lambda batch: self.logprobs(batch, temperature).split(batch.counts))

    def row_scores(self, rows: Sequence[Row]) -> list[float]:
        """The score of each row, without gradient."""
        return self.each_row(rows, lambda batch: self.scores(batch).tolist())

    @torch.no_grad()
    def each_row(
        self, rows: Sequence[Row], measure: Callable[[TokenBatch], Iterable[T]], beside: Sequence[Forward] = ()
    ) -> list[T]:
        """What `measure(batch)` gives for each row of a batch, for all rows and in their order, without gradient."""
        found: dict[int, T] = {}
        for indices, batch in self.batches(rows, beside=beside):
            found |= zip(indices, measure(batch), strict=True)
        return [found[i] for i in range(len(rows))]


def autocast(device: torch.device | str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast where `dtype` asks for it, otherwise nothing."""
    if dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)
