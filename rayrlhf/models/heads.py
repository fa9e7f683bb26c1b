"""Sequence classifiers for architectures that transformers has only as language models.

Its own ones for Llama, Mistral, Qwen and others are a generic class over the base model: a linear layer `score`, read
at the last token. We make the same class for any other architecture with a base model, and register it, so that
AutoModelForSequenceClassification loads what was saved. Outside this package such a reward model needs the class, too.
"""

from __future__ import annotations

from typing import TypeVar

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)


def with_classifier(config: AnyConfig) -> AnyConfig:
    """See that AutoModelForSequenceClassification knows the architecture of a language model; gives the config."""
    kind = type(config)
    speaks = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_MAPPING
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or not speaks:
        return config
    base = MODEL_MAPPING[kind]
    # Its family: what the base model and the language model have in common, such as how weights are drawn.
    family = next((each for each in base.__mro__[1:] if issubclass(each, PreTrainedModel)), PreTrainedModel)
    name = f"{base.__name__.removesuffix('Model')}ForSequenceClassification"
    # Of the two prefixes the family's counts, under which a language model has saved its base model's weights.
    body = {"config_class": kind, "base_model_prefix": family.base_model_prefix, "__module__": __name__}
    made = type(name, (GenericForSequenceClassification, family), body)
    # Without `exist_ok` transformers passes over configs of its own, and says nothing.
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)
    return config
