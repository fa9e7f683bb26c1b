"""What every call of transformers' loaders needs: the config, errors of one line with a remedy, and quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

from rayrlhf.errors import UserError


def read_config(path: str, revision: str | None) -> PreTrainedConfig:
    """The config of a model in a directory or on the hub.

    Raises:
        UserError: it cannot be loaded.
    """
    with one_line_errors(path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    return config


@contextlib.contextmanager
def one_line_errors(path: str) -> Iterator[None]:
    """Turn the errors of transformers and the hub, which may be pages long, into a `UserError` of one line."""
    try:
        yield
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
