"""What a later stage needs of a model's architecture, looked for before the first stage. No weight is read."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rayrlhf.errors import UserError
from rayrlhf.models.heads import with_classifier
from rayrlhf.models.hub import read_config
from rayrlhf.models.loading import score_head


def check_architecture(path: str, revision: str | None, *, scores: bool) -> None:
    """Check that a model can go through the stages of a run.

    Args:
        path: a directory or a hub name.
        revision: of a hub name.
        scores: whether a stage puts a scalar head on it, for a reward or value model.

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
            return
        config.num_labels = 1
        try:
            model = AutoModelForSequenceClassification.from_config(with_classifier(config), trust_remote_code=False)
        except ValueError:
            raise UserError(
                f"model {path!r}: transformers has no base model of type {config.model_type}, which a reward or value "
                "model needs; choose another model, or a run without one (stages=[sft, dpo, evaluate])"
            ) from None
    score_head(model, path)


def _check_names(model: PreTrainedModel, path: str) -> None:
    """Generators are sent weights by their names in memory, and read files by the names there.

    Raises:
        UserError: transformers saves a weight under another name: the experts of Mixtral, which it holds as one tensor.
    """
    held = model.state_dict()
    saved = revert_weight_conversion(model, dict(held))
    changed = sorted(held.keys() - saved.keys())
    if changed:
        raise UserError(
            f"model {path!r}: {type(model).__name__} holds {len(changed)} weights under other names than its files, "
            f"first {changed[0]!r}, so that they cannot be sent to generators; choose an architecture without, such as "
            "a dense model"
        )
