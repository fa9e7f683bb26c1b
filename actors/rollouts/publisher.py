"""A training loop publishes its model: all of the weights each time, or with LoRA only the adapters.

A generator merges the adapters into the frozen weights. The object store keeps those for the whole run, one copy a
node. So a generator always serves an ordinary model: at full speed, and new adapters may arrive in the middle of a
response.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from actors.rollouts.weight_sync import Publication, PublishedWeights, load, publish
from rayrlhf.models.layout import lay_out_together
from rayrlhf.models.lora import Adapter, adapters, frozen_weights, has_adapters


@dataclass(frozen=True)
class AdapterPublication:
    """One version of the adapters, and the frozen weights that they belong to."""

    version: int
    frozen: Publication
    factors: Publication
    """`NAME:down` and `NAME:up` of each adapted weight."""
    adapted: dict[str, tuple[float, bool]]
    """By the name of the weight, its adapter's scaling and `transposed`, see `rayrlhf.models.lora.Adapter`."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once, merged; `WeightSyncError` before the first one if any is corrupt."""
        factors = dict(load(self.factors))
        for name, weight in load(self.frozen):
            if name in self.adapted:
                scaling, transposed = self.adapted[name]
                weight = Adapter(factors[f"{name}:down"], factors[f"{name}:up"], scaling, transposed).merged(weight)
            yield name, weight


class Publisher:
    """Publishes one model, version by version."""

    def __init__(self, model: PreTrainedModel, *, local: bool) -> None:
        """`local`: generators live in this process. Moves the model's parameters together in memory."""
        self.model, self.local = model, local
        self.frozen: Publication | None = None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        lay_out_together(trained)  # so that publishing is one copy of memory
        lay_out_together(parameter for _, parameter in frozen_weights(model))

    def publish(self, version: int) -> PublishedWeights:
        """Copy the weights as they are now; the model may change afterwards.

        Keep the result until every generator has loaded it: the object store drops it with its last reference.
        """
        if not has_adapters(self.model):
            return publish(self.model.named_parameters(), version, local=self.local)
        if self.frozen is None:
            self.frozen = publish(frozen_weights(self.model), 0, local=self.local)
        found = adapters(self.model)
        factors = [
            (f"{name}:{factor}", tensor)
            for name, adapter in found.items()
            for factor, tensor in (("down", adapter.down), ("up", adapter.up))
        ]
        adapted = {name: (adapter.scaling, adapter.transposed) for name, adapter in found.items()}
        return AdapterPublication(version, self.frozen, publish(factors, version, local=self.local), adapted)
