"""Sequence classifiers from elsewhere, whose output is a score: looked at without their weights, loaded, computed.

Any architecture of transformers' AutoModelForSequenceClassification will do, with its own vocabulary. So rows are
padded rectangles with an attention mask, and go through the model's own forward method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from rayrlhf.errors import UserError, one_line
from rayrlhf.models.batching import micro_batches
from rayrlhf.models.files import stored_names
from rayrlhf.models.heads import with_classifier
from rayrlhf.models.hub import check_embedding, one_line_errors, read_config, read_tokenizer
from rayrlhf.models.loading import context_length, load_pretrained


class Facts(NamedTuple):
    """What is known of a classifier without its weights."""

    output: int
    """Index of the output that is the score."""
    parameters: int


def inspect_classifier(path: str, revision: str | None, label: str | int | None) -> Facts:
    """Check that a model has a head, and find the output that `label` names. No weight is read, of a hub model neither.

    Args:
        path: a directory or a hub name, see `rayrlhf.models.loading.resolve_model`.
        revision: of a hub name.
        label: a name in the config's `id2label`, an index, or None for the only output.

    Raises:
        UserError: transformers has no classifier of this architecture; the weights lack the head, which transformers
            would draw at random; there is no such label, or none is given and there are several outputs; or the
            tokenizer cannot be loaded or its chat template takes no dialogue of a user and an assistant.
    """
    config = with_classifier(read_config(path, revision))
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        raise UserError(
            f"model {path!r}: transformers has no sequence classifier of type {config.model_type}"
        ) from None
    base = model.base_model_prefix + "."
    head = [name for name, _ in model.named_parameters() if not name.startswith(base)]
    stored = _weight_names(path, revision)
    missing = [name for name in head if not any(f".{each}".endswith(f".{name}") for each in stored)]
    if missing:
        raise UserError(
            f"model {path!r}: no sequence-classification head (weights that are missing: {', '.join(missing)}); "
            "give a reward model or another classifier"
        )
    tokenizer = read_tokenizer(path, revision)
    check_embedding(tokenizer, path, revision)
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": r, "content": r} for r in ("user", "assistant")], tokenize=False)
        except Exception as error:  # whatever a template raises
            raise UserError(
                f"model {path!r}: its chat template refuses a user's and an assistant's turn: {one_line(error)}"
            ) from None
    return Facts(_output(config, path, label), sum(parameter.numel() for parameter in model.parameters()))


class Classifier:
    """A frozen classifier without dropout, its tokenizer, and the number of tokens that it takes."""

    def __init__(
        self, path: str, revision: str | None, output: int, *, dtype: str, device: torch.device | str, max_tokens: int
    ) -> None:
        """
        Args:
            path: a directory or a hub name.
            revision: of a hub name.
            output: index of the output that is the score.
            dtype: of the weights, in which it also computes.
            device: where it is put.
            max_tokens: most tokens of a micro-batch, padding included; a longer row has one of its own.

        Raises:
            UserError: it cannot be loaded, or weights are missing.
        """
        with_classifier(read_config(path, revision))
        model, info = load_pretrained(AutoModelForSequenceClassification, path, revision, getattr(torch, dtype))
        if info["missing_keys"]:
            raise UserError(f"model {path!r}: weights are missing ({', '.join(sorted(info['missing_keys'])[:5])})")
        self.model = model.requires_grad_(False).to(device)
        self.model.config.use_cache = False  # of keys and values, for tokens that never come
        self.tokenizer = read_tokenizer(path, revision)
        self.output, self.max_tokens = output, max_tokens
        self.bias = float(getattr(model.config, "reward_bias", 0.0))  # of a reward model of this package
        self.text_config = model.config.get_text_config()
        pad = getattr(self.text_config, "pad_token_id", None)
        known = self.model.get_input_embeddings().num_embeddings
        self.pad = pad if pad is not None and 0 <= pad < known else None  # some configs say -1 for none
        self.context = min(context_length(model.config), int(self.tokenizer.model_max_length), *_positions(self.model))

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The score of each row of token ids, in their order."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, float] = {}
        for piece in micro_batches([(1, len(rows[i])) for i in order], self.max_tokens):
            indices = [order[i] for i in piece]
            ids, mask = self._padded([rows[i] for i in indices])
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, self.output]
            found |= zip(indices, (logits.float() + self.bias).tolist(), strict=True)
        return [found[i] for i in range(len(rows))]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """[B, T] token ids, padded on the right, and [B, T] the mask that is 1 at the rows' own.

        Causal classifiers read the last token that is not `pad_token_id` of their config. Where the config has one, it
        pads, so that every row is read where the model's owner reads it. Where it has none, its owner reads the very
        last token, which may be an EOS or whatever else the tokenizer would pad with: then an id pads with which no
        row ends.
        """
        last = {row[-1] for row in rows}
        pad = self.pad if self.pad is not None else next(i for i in range(len(last) + 1) if i not in last)
        self.text_config.pad_token_id = pad
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, pad, np.int64)
        ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
        device = self.model.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask.astype(np.int64)).to(device)


def _output(config: PreTrainedConfig, path: str, label: str | int | None) -> int:
    """The index of the output that `label` names."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    listed = ", ".join(f"{i}: {name}" for i, name in enumerate(names))
    if label is None and len(names) == 1:
        return 0
    if label is None:
        raise UserError(f"model {path!r} has {len(names)} outputs; choose one by `label`: {listed}")
    if label in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise UserError(f"model {path!r} has no label {label!r}; there are {listed}")


def _weight_names(path: str, revision: str | None) -> set[str]:
    """The names of a model's weights by the headers of its safetensors files: in a directory, the cache, or the hub."""
    with one_line_errors(path):
        if Path(path).is_dir():
            return stored_names(Path(path), path)
        # What was loaded here before also works without the network; what is not whole here is so on the hub.
        with contextlib.suppress(LocalEntryNotFoundError, UserError):
            return stored_names(Path(snapshot_download(path, revision=revision, local_files_only=True)), path)
        try:
            return set(get_safetensors_metadata(path, revision=revision).weight_map)
        except NotASafetensorsRepoError:
            raise UserError(
                f"model {path!r}: no safetensors weights; convert them with save_pretrained first"
            ) from None
        except SafetensorsParsingError as error:
            raise UserError(f"model {path!r}: its safetensors cannot be read: {one_line(error)}") from None


def _positions(model: nn.Module) -> list[int]:
    """Tokens that embeddings of positions take which begin behind the padding's own, as RoBERTa's do."""
    return [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
