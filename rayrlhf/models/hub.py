"""What calls of transformers' loaders need: the config, the tokenizer, errors of one line with a remedy, and quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from rayrlhf.data.turns import written_tokens
from rayrlhf.errors import UserError, one_line


def read_config(path: str, revision: str | None) -> PreTrainedConfig:
    """The config of a model in a directory or on the hub.

    Raises:
        UserError: it cannot be loaded.
    """
    with one_line_errors(path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    return config


def read_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer as its owner made it, with or without EOS and PAD. A special token that is empty is none.

    Raises:
        UserError: it cannot be loaded.
    """
    with one_line_errors(path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=False
        )
    for name, token in dict(tokenizer.special_tokens_map).items():
        if token == "":  # in every text, and at its beginning
            setattr(tokenizer, name, None)
    return tokenizer


def check_embedding(tokenizer: PreTrainedTokenizerBase, path: str, revision: str | None) -> None:
    """Check that every token that may come up is a row of the model's embedding.

    Special tokens that nothing writes may lie behind its end, as those for images of a model that reads only text.

    Raises:
        UserError: a token has no row, as after `add_tokens` without `resize_token_embeddings`.
    """
    rows = read_config(path, revision).get_text_config().vocab_size
    silent = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    silent -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, *written_tokens(tokenizer)}
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= rows and token not in silent}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"model {path!r}: token {beyond[first]!r} of its tokenizer has id {first}, and its embedding {rows} rows; "
            "call resize_token_embeddings(len(tokenizer)) on the model and save both"
        )


@contextlib.contextmanager
def one_line_errors(path: str) -> Iterator[None]:
    """Turn the errors of transformers and the hub, which may be pages long, into a `UserError` of one line."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model {path!r}: its weights are cut short or damaged ({one_line(error)}); download or copy it again"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())
        if "couldn't connect" in text.lower() or "offline" in text.lower():
            reason = "not on this machine and the hub cannot be reached; give a local directory or download it first"
        elif "gated repo" in text or "401" in text or "is not a valid model identifier" in text:
            reason = "no such model on the hub, or no access to it; check the name, or log in with `hf auth login`"
        elif "safetensors" in text:
            reason = "no safetensors weights; convert them with save_pretrained first"
        else:
            reason = f"cannot be loaded: {text[:300]}"
        raise UserError(f"model {path!r}: {reason}") from error


def local_directory(model: str) -> Path:
    """The directory of a model's files: a directory itself, or the copy that this machine has of a model on the hub.

    Raises:
        UserError: it is on the hub, and cannot be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    with one_line_errors(model):
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' report of missing weights, which the loaders check themselves, and its progress bars."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
