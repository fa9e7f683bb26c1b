"""How long prompts and responses may be, by the data: `data.max_prompt_tokens` and `data.max_response_tokens`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayrlhf.config import Config
from rayrlhf.data.formats import Use
from rayrlhf.data.sources import NO_LIMIT, DataSet, Rendering
from rayrlhf.data.stored import Records
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COVERED = 0.95
"""Share of the training prompts, and of the responses, that are to fit."""
WITHOUT_RESPONSES = 128
"""Tokens of a response where no stage learns from given ones, so that the data does not say how long one should be."""


@dataclass
class Lengths:
    """Lengths in tokens, before anything is cut. A prompt counts its BOS, a response its end."""

    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)

    def add(self, records: Records[Any], responses: bool = True) -> None:
        """Add those of the prompts of these records, and of the responses unless no stage learns from them."""
        self.prompts += records.column("tokens")
        if responses:
            self.responses += records.lengths().tolist()


def choose_lengths(config: Config, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[Config, str | None]:
    """Choose the lengths of `data` that are not given: 95 % of the training texts fit, as far as the context allows.

    Args:
        config: of the run.
        tokenizer: of its model.
        context: the longest sequence that its model takes, in tokens. The tokenizer may say less, where the model was
            trained on shorter ones.

    Returns:
        The config with the lengths, and a line about them; where both are given, the same config and None.

    Raises:
        UserError: the data cannot be read, or the context is too short for `data.min_response_tokens`.
    """
    data = config.data
    if not data.to_choose:
        return config, None
    context = min(context, int(tokenizer.model_max_length))
    found = measured(config, tokenizer)
    prompt, response = _covering(found.prompts), _covering(found.responses) or WITHOUT_RESPONSES
    # A response has at least a token beside those that it must have, and room for what the config says of its end.
    response = max(response, data.min_response_tokens + 1, config.rl.overlong_tokens or 1)
    if "max_prompt_tokens" not in data.to_choose:
        prompt = data.max_prompt_tokens
        response = max(1, min(response, context - prompt))
    elif "max_response_tokens" not in data.to_choose:
        response = data.max_response_tokens
    else:
        response = min(response, max(context // 2, context - prompt))  # what prompts leave, and at least half
    prompt = max(1, min(prompt, context - response))
    if response <= data.min_response_tokens:
        raise UserError(
            f"data.min_response_tokens={data.min_response_tokens}: of the model's context of {context} tokens, "
            f"{response} are for a response, which could not end; lower it, or give data.max_response_tokens"
        )
    chosen = dict(zip(data.CHOSEN, (prompt, response), strict=True))
    words = []
    for key, lengths in zip(data.CHOSEN, (found.prompts, found.responses), strict=True):
        if key in data.to_choose:
            words.append(f"data.{key}={chosen[key]} ({_shares(key, lengths, chosen[key])})")
    line = f"chosen by the data and the model's context of {context} tokens: {', '.join(words)}"
    return config.model_copy(update={"data": data.completed(chosen)}), line


def measured(config: Config, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """The lengths of the training prompts of all sources, and of the responses that a stage learns from."""
    data, found = config.data, Lengths()
    rendering = Rendering(tokenizer, NO_LIMIT, data.system_prompt)
    demonstrations = DataSet(data.demonstrations, rendering, "demonstration").demonstrations("train").records
    # With an environment, a response is several turns.
    found.add(demonstrations, responses=config.has("sft") and config.environment is None)
    if data.comparisons is not None:
        uses: tuple[Use, ...] = ("comparison", "labelled")
        source = DataSet(data.comparisons, rendering, *uses)
        found.add((source.labelled if source.reading.use == "labelled" else source.comparisons)("train").records)
    if data.prompts is not None:
        asked = DataSet(data.prompts, rendering, "prompt").prompts("train").records
        found.add(asked, responses=False)
    return found


def _covering(lengths: Sequence[int]) -> int:
    """The smallest length that 95 % of them do not exceed; 0 of none.

    >>> _covering([1] * 94 + [7] * 2 + [9] * 4)
    7
    """
    return sorted(lengths)[math.ceil(COVERED * len(lengths) - 1e-9) - 1] if lengths else 0


def _shares(key: str, lengths: Sequence[int], limit: int) -> str:
    what = key.removeprefix("max_").removesuffix("_tokens") + "s"
    if not lengths:
        return f"no stage learns from given {what}"
    longer = sum(length > limit for length in lengths)
    return f"{longer:,} of {len(lengths):,} {what} are longer, up to {max(lengths):,}"
