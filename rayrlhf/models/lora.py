"""LoRA (Hu et al. 2021): frozen weights W, and of each adapted one a trained update scaling * B A of low rank.

The models stay what they are: `peft` puts adapters into their linear layers. B starts at 0, so that a model with new
adapters computes what it did without. Everything that leaves a stage is merged, under the names that it had before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayrlhf.config import LoRAConfig
from rayrlhf.errors import UserError

_ADAPTER = "default"
_BASE = ".base_layer."
"""How peft renames what it wraps: layer.base_layer.weight is what was layer.weight."""


class Adapter(NamedTuple):
    """The update of one weight matrix: W + scaling * up @ down."""

    down: Tensor
    """[rank, in], A in the paper"""
    up: Tensor
    """[out, rank], B in the paper"""
    scaling: float
    """alpha / rank"""
    transposed: bool
    """Whether W is stored as [in, out]."""

    def merged(self, weight: Tensor) -> Tensor:
        """The sum, in the dtype of W, which is left as it is."""
        delta = self.up @ self.down
        return torch.add(weight, delta.T if self.transposed else delta, alpha=self.scaling)


def add_adapters(model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
    """Freeze the model but for new adapters, equal for equal seeds, and a reward or value model's scalar head.

    Raises:
        UserError: a target that is no linear layer of the model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = _linear_layers(model)
    if config.target_modules is not None:
        for target in config.target_modules:
            if not any(_ends_with(layer, target) for layer in layers):
                known = ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in layers}))
                raise UserError(f"model.lora.target_modules: the model has no linear layer {target!r}, but {known}")
        layers = [layer for layer in layers if any(_ends_with(layer, t) for t in config.target_modules)]
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=layers)
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it is then set to what is right
        inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)


def adapters(model: PreTrainedModel) -> dict[str, Adapter]:
    """The model's adapters by the name of the weight they belong to; empty where all weights are trained."""
    from peft.tuners.lora import Linear

    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            assert isinstance(down, Tensor) and isinstance(up, Tensor)
            found[f"{name}.weight"] = Adapter(down, up, float(layer.scaling[_ADAPTER]), bool(layer.fan_in_fan_out))
    return found


def has_adapters(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def frozen_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """What is not trained of a model with adapters, by the names that it has without them."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name.replace(_BASE, "."), parameter


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of an equal model without adapters; what is not adapted is the model's own memory."""
    found = adapters(model)
    merged = {}
    for name, tensor in model.state_dict().items():
        if ".lora_A." not in name and ".lora_B." not in name:
            name = name.replace(_BASE, ".")
            merged[name] = found[name].merged(tensor) if name in found else tensor
    return merged


def trained_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that training changes, for a checkpoint of a model whose other weights are at hand."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained_state(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Take over what `trained_state` gave; ValueError unless it is of the same parameters."""
    own = trained_state(model)
    if own.keys() != state.keys():
        raise ValueError(f"the checkpoint is of other parameters: {sorted(own.keys() ^ state.keys())[:3]}")
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """All of the model without its output head, in which logits and embeddings may be tied."""
    modules = model.base_model.named_modules(prefix=model.base_model_prefix)
    return [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]


def _ends_with(layer: str, target: str) -> bool:
    return layer == target or layer.endswith("." + target)
