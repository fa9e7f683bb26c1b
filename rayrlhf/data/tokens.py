"""Text to token ids and back, the same way at every stage.

A prompt starts with the tokenizer's BOS, if the tokenizer puts one there (OPT: `</s>`, which is both BOS and EOS).
A response starts with a space unless the prompt ends in white space, and it ends with an EOS or the template's end of
turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rayrlhf.config import DataConfig
from rayrlhf.data.turns import cue, end_of_turn, remover, spelled_tokens, turn_texts
from rayrlhf.errors import UserError
from rayrlhf.sections import DrawConfig
from rayrlhf.trajectory import Sampling, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEAM = 64
"""Characters before a text that are tokenised with it."""


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text: its BOS, or none. An EOS that it may put behind is left out."""
    # Any text would do. The lead is all that stands before its own ids.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return list(full[:start])


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Say whether the text spells the BOS itself, as many chat templates do. Such a text must not get another one."""
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts, with a BOS if the tokenizer uses one."""
    if not texts:
        return []
    lead = leading_ids(tokenizer)
    encoded = _plain_ids(tokenizer, texts)
    return [ids if starts_with_bos(tokenizer, text) else lead + ids for text, ids in zip(texts, encoded, strict=True)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one rendered prompt; see `encode_prompts`."""
    return encode_prompts(tokenizer, [text])[0]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, prompts: Sequence[str | None]
) -> list[list[int]]:
    """Token ids of responses, at most `max_tokens` each: [leading space +] text + end.

    They are the ids that the text has behind its prompt: those of prompt and response are those of the joint text.
    The end is the EOS, and behind a prompt that the chat template has rendered it is the template's end of turn.
    A longer response is cut and then has NO end: a model must not learn to stop in the middle of a sentence.

    Args:
        prompts: the rendered prompt of each response. It decides about the leading space: there is none after white
            space or after a special token, with which most chat templates end. None stands for the tokenizer's
            usual prompt, after which there is a space unless the tokenizer has a chat template.
    """
    if not texts:
        return []
    asked = cue(tokenizer)
    before = [(":" if asked is None else asked or "\n") if prompt is None else prompt for prompt in prompts]
    specials = tuple(filter(None, tokenizer.all_special_tokens))
    spaced = [
        text.strip() if not prompt or prompt[-1].isspace() or prompt.endswith(specials) else " " + text.strip()
        for prompt, text in zip(before, texts, strict=True)
    ]
    eos, turn = _eos(tokenizer), _turn_end(tokenizer)
    ends = [turn if asked is not None and prompt.endswith(asked) else eos for prompt in before]
    encoded = continue_texts(tokenizer, before, spaced)
    return [[*ids, end][:max_tokens] for ids, end in zip(encoded, ends, strict=True)]  # the end is the first to be cut


def continue_texts(tokenizer: PreTrainedTokenizerBase, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are behind other texts, whose own ids are left out.

    A tokenizer like Llama's puts a space before whatever it gets, which is right for the beginning of a text only.
    Where a token would reach across the seam, as with "a " and "b" in " b", the text counts as a line of its own: what
    stands before it is fixed.
    """
    if not texts:
        return []
    # The end of what stands before is enough: a tokenizer does not look further back. It is long enough to hold whole
    # any special token that stands at the seam.
    tails = [text[-_SEAM:] for text in before]
    distinct = sorted({*tails, "\n"})
    left_out = dict(zip(distinct, _plain_ids(tokenizer, distinct), strict=True))
    found = _plain_ids(tokenizer, [tail + text for tail, text in zip(tails, texts, strict=True)])
    reaching = [
        i
        for i, (tail, ids) in enumerate(zip(tails, found, strict=True))
        if ids[: len(left_out[tail])] != left_out[tail]
    ]
    lines = _plain_ids(tokenizer, ["\n" + texts[i] for i in reaching])
    for i, ids in zip(reaching, lines, strict=True):
        tails[i], found[i] = "\n", ids
    return [ids[len(left_out[tail]) :] for tail, ids in zip(tails, found, strict=True)]


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, prompt: str | None = None
) -> list[int]:
    """Token ids of one response; see `encode_responses`. Pass the rendered prompt wherever it is at hand."""
    return encode_responses(tokenizer, [text], max_tokens, [prompt])[0]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a response: up to its first EOS or end of turn, without special tokens, stripped."""
    ends = {_eos(tokenizer), _turn_end(tokenizer)}
    kept = list(itertools.takewhile(lambda token: token not in ends, map(int, ids)))
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def decode_trajectory(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> str:
    """Text of a response; of one in several turns all turns and the observations between them."""
    ids = trajectory.response_ids.tolist()
    if trajectory.written is None:
        return decode_response(tokenizer, ids)
    end = _turn_end(tokenizer)  # which need not be a special token
    ids = [token for token in ids if token != end]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids of `data.stop_tokens`.

    Raises:
        UserError: a text that is not exactly one token.
    """
    found = []
    for text, ids in zip(texts, continue_texts(tokenizer, ["a"] * len(texts), texts), strict=True):
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
    """Make a function that removes the spelling of special tokens and of the chat template's tokens from a text.

    A post may contain `</s>`, which is also HTML. Left in, it would end the post, or let it pose as another speaker.
    """
    return remover(spelled_tokens(tokenizer))


def message_cleaner(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Make a function that removes the same from a turn of a dialogue, and also all texts that would open a turn."""
    return remover(spelled_tokens(tokenizer) | turn_texts(tokenizer))


def check_context(max_prompt_tokens: int, max_response_tokens: int, context_length: int) -> None:
    """Raise UserError unless the longest prompt and the longest response fit the model's context (all in tokens)."""
    total = max_prompt_tokens + max_response_tokens
    if total > context_length:
        raise UserError(
            f"data.max_prompt_tokens + data.max_response_tokens = {max_prompt_tokens} + {max_response_tokens} = {total}"
            f" exceeds the model's context of {context_length} tokens; lower one of them or choose another model"
        )


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts without the tokens that a tokenizer puts around a text."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id with which the chat template ends an assistant's turn; the EOS where it has none."""
    end = end_of_turn(tokenizer)
    found = None if end is None else tokenizer.convert_tokens_to_ids(end)
    return found if isinstance(found, int) else _eos(tokenizer)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id
