"""Writing a model to a directory, and the check before it is written for good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rayrlhf.files import replacing
from rayrlhf.models.ends import end_ids
from rayrlhf.models.hub import quiet
from rayrlhf.models.lora import has_adapters, merged_state, save_adapters
from rayrlhf.models.ranks import Ranks

ADAPTERS = "adapters"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    stop_tokens: Sequence[str] = (),
    **config_fields: Any,
) -> None:
    """Write a Hugging Face directory with float32 safetensors, which transformers and vLLM load.

    The directory appears as a whole, in place of an older one. Adapters are merged into the weights, and their own
    weights stand in the subdirectory `adapters`, for peft's `PeftModel.from_pretrained`.

    Args:
        model: its generation config is replaced by one that holds the special tokens and nothing else. vLLM would
            otherwise sample with the top-p or temperature that a model brings along, without saying so.
        tokenizer: saved beside it.
        directory: where to.
        stop_tokens: end a response beside the EOS; the generation config has them, too.
        config_fields: written into config.json, such as `reward_bias`.
    """
    directory = Path(directory)
    for key, value in {"pad_token_id": tokenizer.pad_token_id, **config_fields}.items():
        setattr(model.config, key, value)
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end_ids(tokenizer, stop_tokens),
            pad_token_id=tokenizer.pad_token_id,
        )
    with replacing(directory, directory=True) as partial, quiet():
        model.save_pretrained(partial, state_dict=merged_state(model) if has_adapters(model) else None)
        tokenizer.save_pretrained(partial)
        if has_adapters(model):
            save_adapters(model, partial / ADAPTERS)


def require_finite(model: nn.Module, what: str, ranks: Ranks) -> None:
    """Look at every weight, on every rank alike. To be called after the last update, before the model is saved.

    An update can break a model although its gradients were finite (a learning rate that is far too high), and the next
    loss, which would show it, is never computed.

    Args:
        model: with or without adapters; frozen weights are looked at as well.
        what: names the model in the message, such as "sft: the model".
        ranks: all of them raise if one finds a weight that is not finite.

    Raises:
        FloatingPointError: names the first parameter that is not finite.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    # One small tensor for each parameter, and one copy from the device for all of them.
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).tolist()
    first = finite.index(False) if False in finite else len(finite)
    # The smallest index over ranks: once models are sharded, a rank sees only its part of each parameter.
    first = int(-ranks.max(-float(first)))
    if first < len(names):
        raise FloatingPointError(
            f"{what} has weights that are not finite after the last update, the first of them in {names[first]} "
            "(usually a learning rate that is too high)"
        )
