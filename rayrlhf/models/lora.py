"""LoRA (Hu et al. 2021): the weights W are frozen, and an update of low rank, scaling * B A, is trained beside each.

`peft` puts the adapters into the model's linear layers; the model stays an object of its own class. B starts at 0, so a
model with new adapters computes the same as without. What a stage saves is merged, W + scaling * B A, under the names
of a model without adapters; the adapters themselves stand beside it, as peft writes them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayrlhf.config import LoRAConfig
from rayrlhf.errors import UserError

_ADAPTER = "default"
_BASE = ".base_layer."
"""peft wraps a layer and so renames its weight: layer.weight becomes layer.base_layer.weight."""


class Adapter(NamedTuple):
    """The update of one weight matrix: W + scaling * up @ down."""

    down: Tensor
    """[rank, in], A in the paper"""
    up: Tensor
    """[out, rank], B in the paper"""
    scaling: float
    """alpha / rank"""
    transposed: bool
    """whether W is stored as [in, out], as GPT-2 does"""

    def merged(self, weight: Tensor) -> Tensor:
        """A new tensor with the sum, in the dtype and layout of W."""
        delta = self.up @ self.down
        return torch.add(weight, delta.T if self.transposed else delta, alpha=self.scaling)


def add_adapters(model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
    """Freeze the model and add adapters. They are trained, and so is the scalar head of a reward or value model.

    Args:
        model: changed in place.
        config: rank, alpha, and the layers to adapt (by default all linear ones but the output head).
        seed: of A; equal seeds give equal adapters.

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
    # A fork, because peft draws A from torch's global generator, and nothing else may depend on there being adapters.
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft warns of GPT-2's transposed layers, and then treats them rightly.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)


def adapters(model: PreTrainedModel) -> dict[str, Adapter]:
    """The model's adapters by the name of the weight that each updates; empty if all weights are trained."""
    from peft.tuners.lora import Linear

    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            assert isinstance(down, Tensor) and isinstance(up, Tensor)
            found[f"{name}.weight"] = Adapter(down, up, float(layer.scaling[_ADAPTER]), bool(layer.fan_in_fan_out))
    return found


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_adapters` was applied to the model."""
    return hasattr(model, "peft_config")


def frozen_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model with adapters that are not trained, under their names in a model without adapters."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name.replace(_BASE, "."), parameter


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of a model without adapters that computes the same.

    Adapted weights are new tensors; the others share the model's memory.
    """
    found = adapters(model)
    merged = {}
    for name, tensor in model.state_dict().items():
        if not _is_factor(name):
            name = name.replace(_BASE, ".")
            merged[name] = found[name].merged(tensor) if name in found else tensor
    return merged


def save_adapters(model: PreTrainedModel, directory: Path) -> None:
    """Write a directory that peft's `PeftModel.from_pretrained` puts onto the model that training started from.

    The trained head of a reward or value model is in it, too.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    settings = copy.copy(model.peft_config[_ADAPTER])
    settings.base_model_name_or_path = model.name_or_path
    heads = sorted({name.partition(".")[0] for name in trained_state(model) if not _is_factor(name)})
    settings.modules_to_save = heads or None
    settings.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    directory.mkdir()
    settings.save_pretrained(str(directory))
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in trained_state(model).items()
    }
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def trained_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The trained parameters by name. A checkpoint needs no more: the frozen ones are those training started from."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained_state(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Copy into the model what `trained_state` gave.

    Raises:
        ValueError: the state has other parameters than the model.
    """
    own = trained_state(model)
    if own.keys() != state.keys():
        raise ValueError(f"the checkpoint is of other parameters: {sorted(own.keys() ^ state.keys())[:3]}")
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the output head, whose weight may be that of the embedding as well."""
    modules = model.base_model.named_modules(prefix=model.base_model_prefix)
    return [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]


def _is_factor(name: str) -> bool:
    """Whether a parameter is A or B of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def _ends_with(layer: str, target: str) -> bool:
    return layer == target or layer.endswith("." + target)
