"""Models and tokenizers from a directory, the Hugging Face hub, or the package itself.

Weights are read from safetensors only, and code from a model's repository is never run. Weights are kept in float32;
autocast may compute in less. Dropout is off in training as well, so that a forward pass depends on weights and tokens
only: `rl` compares log-probs of two passes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.batching import collate
from rayrlhf.models.files import stored_names
from rayrlhf.models.heads import with_classifier
from rayrlhf.models.hub import check_embedding, one_line_errors, quiet, read_config, read_tokenizer
from rayrlhf.models.logprobs import hidden_states

_ASSETS = Path(__file__).parent.parent / "assets"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spm.model", "spiece.model")
_SPARE_TOKENS = (
    "<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<|extratoken_1|>",
    "<|reserved_special_token_0|>",
)  # fmt: skip
"""Tokens that published vocabularies reserve for padding, or leave unused."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


def resolve_model(path: str) -> str:
    """The place that the other functions load from: an absolute directory, or a hub name as it was given.

    Args:
        path: a directory, a name on the hub (organisation/name), or `embedded:NAME` for a model of the package.

    Raises:
        UserError: no such embedded model or directory, or a directory without config or tokenizer, or without the
            whole of its safetensors.
    """
    if path.startswith("embedded:"):
        directory = _ASSETS / path.removeprefix("embedded:")
        if not (directory / "config.json").is_file():
            known = ", ".join(sorted(f"embedded:{p.parent.name}" for p in _ASSETS.glob("*/config.json")))
            raise UserError(f"model {path!r}: no such embedded model; known: {known}")
        return str(directory)
    directory = Path(path).expanduser()
    if not directory.is_dir():
        if _HUB_NAME.fullmatch(path) and not directory.exists():
            return path
        raise UserError(f"model {path!r}: no such directory, and not a hub name (organisation/name)")
    if not (directory / "config.json").is_file():
        raise UserError(f"model {path!r}: the directory has no config.json; point at a Hugging Face model directory")
    stored_names(directory, path)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"model {path!r}: no tokenizer files; save the tokenizer into the same directory")
    return str(directory.resolve())


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with an EOS and a PAD that differs from it, whose ids are all rows of the model's embedding.

    If PAD were EOS, the end of a response could not be told from padding. A tokenizer without a PAD of its own gets one
    of these, the first that there is: a token that the vocabulary reserves for such uses, a new token for an unused row
    of the embedding, the unknown token.

    Raises:
        UserError: it cannot be loaded, has no EOS, has no token that could serve as PAD, or see `check_embedding`.
    """
    tokenizer = read_tokenizer(path, revision)
    tokenizer.padding_side = "right"  # nothing here pads with it; it is for users of the saved tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {path!r}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        spare = next((token for token in _SPARE_TOKENS if vocabulary.get(token, tokenizer.eos_token_id)
                      != tokenizer.eos_token_id), None)  # fmt: skip
        if spare is not None:
            tokenizer.pad_token = spare
        # Published embeddings are often padded to a multiple of 64 or more, which leaves rows without a token.
        elif max(vocabulary.values()) + 1 < read_config(path, revision).get_text_config().vocab_size:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            raise UserError(
                f"model {path!r}: the tokenizer has no pad_token other than its EOS and no spare token; add one, "
                "resize the model's embeddings to match, save both and point model.path at that directory"
            )
    check_embedding(tokenizer, path, revision)
    return tokenizer


def load_policy(path: str, revision: str | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model in float32, without dropout, in eval mode, with gradients on.

    Raises:
        UserError: it cannot be loaded, is no causal language model, or lacks weights; or its logits are not
            lm_head(last hidden state) but scaled or capped, so that `token_logprobs` would be wrong without a sign.
    """
    model, info = load_pretrained(AutoModelForCausalLM, path, revision)
    if info["missing_keys"]:
        raise UserError(f"model {path!r}: weights are missing ({_some(info['missing_keys'])}); not a language model")
    if "score.weight" in info["unexpected_keys"]:
        raise UserError(f"model {path!r}: this is a reward model (it has a score head); give a language model instead")
    _require_plain_logits(model, path)
    return model.to(device)


def load_reward_model(
    path: str,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    *,
    fresh_head_seed: int | None = None,
) -> PreTrainedModel:
    """A model with a scalar `score` head in float32, without dropout, in eval mode, with gradients on.

    Args:
        path: a reward model; with `fresh_head_seed` also a language model.
        revision: of a model on the hub.
        device: where it is put.
        fresh_head_seed: lets a model without a head get a new one, drawn from N(0, 1 / (hidden + 1)) and with bias 0
            (Stiennon et al. 2020, appendix B.1; Huang et al. 2024). A head that is there is kept.

    Raises:
        UserError: it cannot be loaded, has several labels, has no head and no seed was given, or is of an architecture
            without `score`.
    """
    config = with_classifier(read_config(path, revision))
    if "ForSequenceClassification" in "".join(config.architectures or []) and config.num_labels != 1:
        raise UserError(f"model {path!r}: its head has {config.num_labels} labels; a reward model has one scalar score")
    model, info = load_pretrained(AutoModelForSequenceClassification, path, revision, num_labels=1)
    head = score_head(model, path)
    missing = set(info["missing_keys"])
    if missing - {"score.weight", "score.bias"}:
        raise UserError(f"model {path!r}: weights are missing ({_some(missing)})")
    if missing:
        if fresh_head_seed is None:
            raise UserError(f"model {path!r}: no score head, this is not a reward model; train one with reward_model")
        generator = torch.Generator().manual_seed(fresh_head_seed)
        with torch.no_grad():
            head.weight.normal_(0.0, (head.in_features + 1) ** -0.5, generator=generator)
            if head.bias is not None:
                head.bias.zero_()
    return model.to(device)


def score_head(model: PreTrainedModel, path: str) -> nn.Linear:
    """The scalar head of a sequence classifier.

    Raises:
        UserError: its head is of another kind.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"model {path!r}: {type(model).__name__} has no linear `score` head; use a decoder-only model")
    return head


def checkpoint_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model keep only the input of each layer, and compute the rest again in the backward pass.

    Results do not change. Returns the same model.

    Raises:
        UserError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot checkpoint gradients; set resources.learner.gradient_checkpointing to false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()  # transformers does this in training mode only; dropout is off anyway


def check_vocabulary(
    policy_path: str,
    reward_path: str,
    what: str = "reward model",
    remedy: str = "train the reward model from a model with the policy's tokenizer",
) -> None:
    """Check that both models mean the same by a token id: ids travel from the policy to the reward model.

    Args:
        policy_path: a directory or a hub name.
        reward_path: the same, of the reward model or of another policy.
        what: names the second one in errors.
        remedy: ends these.

    Raises:
        UserError: the mappings from token to id differ, or the vocabulary sizes do.
    """
    policy, reward = load_tokenizer(policy_path).get_vocab(), load_tokenizer(reward_path).get_vocab()
    if policy != reward:
        differing = {t for t in policy.keys() | reward.keys() if policy.get(t) != reward.get(t)}
        raise UserError(
            f"different tokenizers ({len(differing)} tokens, such as {min(differing)!r}): {what} {reward_path!r} and "
            f"policy {policy_path!r}; {remedy}"
        )
    sizes = [read_config(path, None).get_text_config().vocab_size for path in (policy_path, reward_path)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"vocabularies of {sizes[1]} and {sizes[0]} rows: {what} {reward_path!r} and policy {policy_path!r}; "
            + remedy
        )


def context_length(model: str | PreTrainedConfig) -> int:
    """The longest sequence that a model takes, in tokens.

    A model without a limit in its config (BLOOM) counts as 2048, the same number that vLLM assumes.
    """
    config = read_config(model, None) if isinstance(model, str) else model
    config = config.get_text_config()
    lengths = [getattr(config, key, None) for key in _CONTEXT_KEYS]
    return min((length for length in lengths if isinstance(length, int) and length > 0), default=2048)


def load_pretrained(
    auto: Any, path: str, revision: str | None, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model without dropout in eval mode, and transformers' report of weights that are missing or unexpected.

    Args:
        auto: the class that loads it, such as AutoModelForCausalLM.
        path: a directory or a hub name.
        revision: of a hub name.
        dtype: of the weights.
        options: of the class; `num_labels` changes the config.

    Raises:
        UserError: it cannot be loaded.
    """
    config = read_config(path, revision)
    # Before the model is built: some architectures read the rates then, others in each forward pass.
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if ("dropout" in key or "pdrop" in key or key == "layerdrop") and isinstance(value, float):
                setattr(part, key, 0.0)
    with one_line_errors(path), quiet():
        model, info = auto.from_pretrained(
            path, config=config, revision=revision, dtype=dtype, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **_labels(config, options),
        )  # fmt: skip
    # And the modules as well: a rate may have another name in the config than the names looked for above.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval(), info


def _labels(config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    # Given a config, from_pretrained passes num_labels on to the model's constructor, which refuses it.
    if "num_labels" in options:
        config.num_labels = options.pop("num_labels")
    return options


def _require_plain_logits(model: PreTrainedModel, path: str) -> None:
    """Check on five tokens that the model's logits are those of its output head.

    Raises:
        UserError: the model scales or caps them afterwards.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(1, 6).unsqueeze(0)
    batch = collate([Row.completion([1], [2, 3, 4, 5])], pad_token_id=0)
    # The hook makes logits 1000 times as large: a soft cap hardly changes small ones, and would not be noticed.
    handle = head.register_forward_hook(lambda _module, _inputs, output: output * 1e3) if head is not None else None
    try:
        with torch.no_grad():
            plain = head is not None and torch.allclose(
                model(input_ids=ids, use_cache=False).logits[0], head(hidden_states(model, batch)), rtol=1e-3, atol=1e-2
            )
    finally:
        if handle is not None:
            handle.remove()
    if not plain:
        raise UserError(
            f"model {path!r}: {type(model).__name__} scales or caps its logits after lm_head, which the log-probs here "
            "do not; use a model without (OPT, GPT-J, GPT-NeoX, BLOOM, Llama, Mistral, Qwen and the like)"
        )


def _some(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:3]) + (" ..." if len(keys) > 3 else "")
