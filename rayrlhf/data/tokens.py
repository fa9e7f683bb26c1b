"""Text to token ids and back, the same way at every stage.

A prompt starts with the tokenizer's BOS, if the tokenizer puts one there (OPT: `</s>`, which is both BOS and EOS).
A response starts with a space unless the prompt ends in white space, and it ends with an EOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rayrlhf.config_data import DataConfig
from rayrlhf.errors import UserError
from rayrlhf.sections import DrawConfig
from rayrlhf.trajectory import Sampling, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text: its BOS, or none. An EOS that it may put behind is left out."""
    # Any text would do. The lead is all that stands before its own ids.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return list(full[:start])


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Say whether the text spells the BOS itself, as many chat templates do. Such a text must not get another one."""
    return isinstance(tokenizer.bos_token, str) and text.startswith(tokenizer.bos_token)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts, with a BOS if the tokenizer uses one."""
    if not texts:
        return []
    lead = leading_ids(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [
        list(ids) if starts_with_bos(tokenizer, text) else lead + ids for text, ids in zip(texts, encoded, strict=True)
    ]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one rendered prompt; see `encode_prompts`."""
    return encode_prompts(tokenizer, [text])[0]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, prompts: Sequence[str | None]
) -> list[list[int]]:
    """Token ids of responses, at most `max_tokens` each: [leading space +] text + EOS.

    A longer response is cut and then has NO EOS: a model must not learn to stop in the middle of a sentence.

    Args:
        prompts: the rendered prompt of each response. It decides about the leading space: there is none after white
            space or after a special token, with which most chat templates end. None stands for the tokenizer's
            usual prompt, after which there is a space unless the tokenizer has a chat template.
    """
    if not texts:
        return []
    eos = _eos(tokenizer)
    specials = tuple(tokenizer.all_special_tokens)

    def lead(prompt: str | None) -> str:
        if prompt is None:
            return "" if tokenizer.chat_template else " "
        return "" if not prompt or prompt[-1].isspace() or prompt.endswith(specials) else " "

    stripped = [lead(prompt) + text.strip() for text, prompt in zip(texts, prompts, strict=True)]
    encoded = tokenizer(stripped, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [[*ids, eos][:max_tokens] for ids in encoded]  # the EOS is the first to be cut


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, prompt: str | None = None
) -> list[int]:
    """Token ids of one response; see `encode_responses`. Pass the rendered prompt wherever it is at hand."""
    return encode_responses(tokenizer, [text], max_tokens, [prompt])[0]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a response: up to its first EOS, without special tokens, stripped."""
    eos = _eos(tokenizer)
    kept = [int(token) for token in ids]
    if eos in kept:
        kept = kept[: kept.index(eos)]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def decode_trajectory(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> str:
    """Text of a response; of one in several turns all turns and the observations between them."""
    ids = trajectory.response_ids.tolist()
    if trajectory.written is None:
        return decode_response(tokenizer, ids)
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids of `data.stop_tokens`.

    Raises:
        UserError: a text that is not exactly one token.
    """
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"data.stop_tokens: {text!r} is {len(ids)} tokens of this tokenizer "
                f"({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))}); give texts that are one token each"
            )
        found.append(int(ids[0]))
    return tuple(found)


def sampling_of(tokenizer: PreTrainedTokenizerBase, data: DataConfig, draw: DrawConfig, max_turns: int = 1) -> Sampling:
    """How the responses of a run are sampled: every stage has the lengths and the ends of `data`.

    Raises:
        UserError: a stop token that is not one token.
    """
    return Sampling(
        draw.temperature,
        data.max_response_tokens,
        _eos(tokenizer),
        stop_token_ids(tokenizer, data.stop_tokens),
        max_turns,
        data.min_response_tokens,
        Truncation(draw.top_p, draw.top_k, draw.min_p),
    )


def special_text_remover(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Make a function that removes the spelling of special tokens from a text.

    A post may contain `</s>`, which is also HTML. Left in, it would end the post, or let it pose as another speaker.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    if not special:
        return lambda text: text
    # Longest first: a shorter special token may be the beginning of a longer one.
    pattern = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))

    def remove(text: str) -> str:
        # Again until none is found: removing one may join the halves of another, as in `</</s>s>`.
        while pattern.search(text):
            text = pattern.sub("", text)
        return text

    return remove


def check_context(max_prompt_tokens: int, max_response_tokens: int, context_length: int) -> None:
    """Raise UserError unless the longest prompt and the longest response fit the model's context (all in tokens)."""
    total = max_prompt_tokens + max_response_tokens
    if total > context_length:
        raise UserError(
            f"data.max_prompt_tokens + data.max_response_tokens = {max_prompt_tokens} + {max_response_tokens} = {total}"
            f" exceeds the model's context of {context_length} tokens; lower one of them or choose another model"
        )


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id
