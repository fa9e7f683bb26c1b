"""What a model's architecture says before the first stage: whether later stages can have it, and its size.

No weight is read.
"""

from __future__ import annotations

from collections import Counter

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rayrlhf.config import LoRAConfig
from rayrlhf.errors import UserError
from rayrlhf.models.heads import with_classifier
from rayrlhf.models.hub import read_config
from rayrlhf.models.loading import score_head
from rayrlhf.models.lora import add_adapters

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of models that vLLM serves on CPUs."""


def check_architecture(path: str, revision: str | None, *, scores: bool) -> PreTrainedModel:
    """Check that a model can go through the stages of a run.

    Args:
        path: a directory or a hub name.
        revision: of a hub name.
        scores: whether a stage puts a scalar head on it, for a reward or value model.

    Returns:
        The language model on torch's device `meta`: its parameters have names and shapes, and no values.

    Raises:
        UserError: it is no language model, its weights have other names in files than in memory, or it can get no head.
    """
    config = read_config(path, revision)
    with torch.device("meta"):
        try:
            policy = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:
            raise UserError(
                f"model {path!r}: transformers has no language model of type {config.model_type}; choose another model"
            ) from None
        _check_names(policy, path)
        if not scores:
            return policy
        config.num_labels = 1
        try:
            model = AutoModelForSequenceClassification.from_config(with_classifier(config), trust_remote_code=False)
        except ValueError:
            raise UserError(
                f"model {path!r}: transformers has no base model of type {config.model_type}, which a reward or value "
                "model needs; choose another model, or a run without one (stages=[sft, dpo, evaluate])"
            ) from None
    score_head(model, path)
    return policy


def parameter_counts(policy: PreTrainedModel, lora: LoRAConfig | None = None) -> tuple[int, int]:
    """The numbers of frozen and of trained parameters of a policy without weights, which gets its adapters here.

    Raises:
        UserError: the model has no layer that `lora` targets.
    """
    if lora:
        with torch.device("meta"):
            add_adapters(policy, lora, seed=0)
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    return sum(parameter.numel() for parameter in policy.parameters()) - trained, trained


def check_head_size(policy: PreTrainedModel, path: str) -> None:
    """Check that vLLM can sample from a model on CPUs, which shows there only with the first token.

    Raises:
        UserError: its attention heads are of another size than `HEAD_SIZES`.
    """
    config = policy.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in HEAD_SIZES:
        raise UserError(
            f"model {path!r}: its attention heads have {size} dimensions, and on CPUs vLLM samples from models with "
            f"{', '.join(map(str, HEAD_SIZES))}; choose another model, or give resources.generators a GPU"
        )


def _check_names(model: PreTrainedModel, path: str) -> None:
    """Generators are sent the tensors that the model holds, and vLLM reads those that files have.

    A tensor with another name only passes, as the output head of GPT-NeoX: generators know both names.

    Raises:
        UserError: transformers saves other tensors than it holds: the experts of Mixtral are one in memory.
    """
    held = model.state_dict()
    saved = revert_weight_conversion(model, dict(held))
    shapes = [Counter(tuple(tensor.shape) for tensor in state.values()) for state in (held, saved)]
    if shapes[0] != shapes[1]:
        changed = sorted(held.keys() - saved.keys())
        raise UserError(
            f"model {path!r}: {type(model).__name__} holds other weights than its files do ({len(changed)}, first "
            f"{changed[0]!r}), so that they cannot be sent to generators; choose a model without, such as a dense one"
        )
