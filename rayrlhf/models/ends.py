"""The tokens that end a response of a model: its EOS is often not the only one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import GenerationConfig

from rayrlhf.config import Config
from rayrlhf.data.tokens import stop_token_ids
from rayrlhf.data.turns import end_of_turn
from rayrlhf.errors import UserError
from rayrlhf.models.hub import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_ends(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Config, list[str]]:
    """Let the tokens that end a response of the model join `data.stop_tokens`, from which every stage takes its ends.

    Args:
        config: of the run.
        path: of its model, see `rayrlhf.models.loading.resolve_model`.
        tokenizer: of the model.

    Returns:
        The config, unchanged where the EOS is the only end; and a line for each token that has joined.
    """
    origins: dict[str, str] = {}
    if end := end_of_turn(tokenizer):
        origins[end] = "the chat template ends a turn with it"
    for id in _generation_eos_ids(path, config.model.revision):
        token = str(tokenizer.decode([id]))
        try:
            spelled = stop_token_ids(tokenizer, [token]) == (id,)
        except UserError:
            spelled = False
        if spelled:  # an id that no text spells is none that this tokenizer knows
            origins.setdefault(token, "generation_config.json has it among its eos_token_id")
    known = (tokenizer.eos_token, *config.data.stop_tokens)
    origins = {token: origin for token, origin in origins.items() if token not in known}
    if not origins:
        return config, []
    data = config.data.model_copy(update={"stop_tokens": (*config.data.stop_tokens, *origins)})
    lines = [f"a response also ends with {token!r}: {origin}" for token, origin in origins.items()]
    return config.model_copy(update={"data": data}), lines


def end_ids(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str]) -> int | list[int]:
    """EOS and stop tokens as a generation config has them: one id, or several."""
    ids = list(dict.fromkeys([int(tokenizer.eos_token_id), *stop_token_ids(tokenizer, stop_tokens)]))
    return ids if len(ids) > 1 else ids[0]


def _generation_eos_ids(path: str, revision: str | None) -> list[int]:
    """The EOS ids of the model's generation config, or of its config where there is none."""
    try:
        found = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:  # no such file
        found = getattr(read_config(path, revision).get_text_config(), "eos_token_id", None)
    return [found] if isinstance(found, int) else [int(id) for id in found or ()]
