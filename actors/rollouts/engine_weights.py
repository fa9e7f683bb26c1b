"""Load new weights into a running vLLM engine: check that they are complete, then make vLLM take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from actors.rollouts.weight_sync import WeightSyncError


@dataclass(frozen=True)
class CheckpointLayout:
    """The tensors that make up a complete set of an architecture's weights."""

    shapes: dict[str, tuple[int, ...]]
    """By the names in files, which vLLM reads."""
    aliases: frozenset[str]
    """Second names of tied tensors, such as the output head's. A set may have them or not."""
    names: dict[str, str]
    """From those in memory to those in files: transformers has new names for the weights of some older families."""

    @classmethod
    def read(cls, model_path: str, revision: str | None) -> CheckpointLayout:
        """Of a model directory or hub name, from its config: no weights are read."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path, revision=revision))
        held = model.state_dict()
        in_files = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(held)).items()}
        names = {name: in_files.get(id(tensor), name) for name, tensor in held.items()}
        unique = {name for name, _ in model.named_parameters()}
        aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - unique
        shapes = {names[name]: tuple(tensor.shape) for name, tensor in held.items() if name not in aliases}
        return cls(shapes, frozenset({*aliases, *(names[alias] for alias in aliases)}), names)

    def validated(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """The tensors by the names in files, without aliases.

        Args:
            tensors: by their names in memory or in files.

        Raises:
            WeightSyncError: they are no complete set.
        """
        weights = [(self.names.get(name, name), tensor) for name, tensor in tensors if name not in self.aliases]
        shapes = {name: tuple(tensor.shape) for name, tensor in weights}
        wanted = self.shapes
        faults = {
            "missing": sorted(wanted.keys() - shapes.keys()),
            "unknown": sorted(shapes.keys() - wanted.keys()),
            "of another shape": sorted(n for n in shapes.keys() & wanted.keys() if shapes[n] != wanted[n]),
            "given twice": sorted({name for name, count in Counter(name for name, _ in weights).items() if count > 1}),
        }
        found = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in faults.items() if names)
        if found:
            raise WeightSyncError(f"the weights do not fit the model, nothing was loaded: {found}")
        return weights


def reload(worker: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
    """Replace the weights of vLLM's model; runs on vLLM's worker, between two steps.

    vLLM's own layerwise reload does the work. It keeps old weights without an error where it loads none, so the names
    that it loaded are compared with those of the model.

    Raises:
        RuntimeError: vLLM kept some of the old weights.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        initialize_layerwise_reload(model)
        loaded = model.load_weights(iter(weights))
        finalize_layerwise_reload(model, worker.model_config)
    if loaded is not None and expected - loaded:
        raise RuntimeError(f"vLLM kept old weights for {sorted(expected - loaded)[:3]}")
    for layer in model.modules():
        # On a CPU the output head multiplies with a packed copy of its weight, which the reload leaves as it was
        # when head and embedding are tied: without an error, log-probs would come from old and new weights mixed.
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
