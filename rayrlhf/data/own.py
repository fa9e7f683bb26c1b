"""The rows of people's own files, in the shapes that TRL and others have made common.

A prompt is a text (`prompt`) or a dialogue (`prompt`, `messages` or `conversations`: a list of turns); so is an answer,
which may also be the last turn of the dialogue. A bad row is an error, since its owner can mend it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rayrlhf.data.files import SourceRow
from rayrlhf.data.published import hh_comparison, is_dialogue
from rayrlhf.data.raw import RawComparison, RawDemonstration, RawLabelled, RawPrompt, SkipRow
from rayrlhf.data.records import Message
from rayrlhf.data.template import ChatPrompt, PromptParts, plain_prompt
from rayrlhf.errors import UserError
from rayrlhf.wording import names, shown

DIALOGUES = ("messages", "conversations")
RESPONSES = ("response", "completion", "reference")
_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip
"""What others call the three who speak, and what we do."""
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # CSV has texts

# --- Turns of a dialogue ---------------------------------------------------------------------------------------------


def dialogue(row: SourceRow, column: str) -> list[Message]:
    """The turns in a column: `{"role", "content"}` or `{"from", "value"}` objects, or a single one.

    Raises:
        UserError: something else; a turn that is empty, of a speaker unknown here, or has parts other than text.
    """
    value = row.get(column)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{row.where}: {column!r} must be a list of {{"role", "content"}} objects')
    return [_turn(item, f"{row.where}: message {number}") for number, item in enumerate(turns, start=1)]


def _turn(item: Any, where: str) -> Message:
    own: dict[str, Any] = item if isinstance(item, dict) else {}
    keys = ("from", "value") if own.get("from") is not None else ("role", "content")
    role, content = (own.get(key) for key in keys)
    text = _content(content, where)
    if role is not None and not (isinstance(role, str) and role in _ROLES):
        raise UserError(f"{where} has the role {shown(role)}; those that can be read are: {_SPEAKERS}")
    if role is None or not text.strip():
        raise UserError(f"{where} needs a role (system, user or assistant) and a content")
    return Message(_ROLES[role], text.strip())


_SPEAKERS = ", ".join(_ROLES)


def _content(content: Any, where: str) -> str:
    """The text of a turn, which may be given in parts."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else ():
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise UserError(f"{where} has a part of the type {shown(kind)}; only text can be read")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UserError(f"{where} has a part without a text")
        texts.append(text)
    return "".join(texts)


# --- Prompts and answers ---------------------------------------------------------------------------------------------


def _prompt(row: SourceRow) -> tuple[PromptParts, str | None, str]:
    """The prompt, the reply if the dialogue ends with one, and the column that they are from."""
    column = row.first_of(*DIALOGUES, "prompt")
    if not row.holds(column):
        raise UserError(f"{row.where}: no 'prompt' (text) or 'messages'; there are: {names(row.values)}")
    if column == "prompt" and not isinstance(row.values["prompt"], list):
        return plain_prompt(row.text("prompt")), None, column
    turns = dialogue(row, column)
    reply = turns.pop().content if turns[-1].role == "assistant" else None
    if not turns or turns[-1].role != "user":
        raise UserError(f"{row.where}: {column!r} must hold a user's turn before the answer")
    return ChatPrompt(tuple(turns)), reply, column


def _reply(row: SourceRow, column: str) -> str:
    """An answer: a text, or a list with one reply, as TRL has dialogues."""
    if not isinstance(row.values.get(column), list):
        return row.text(column).strip()
    turns = dialogue(row, column)
    if [turn.role for turn in turns] != ["assistant"]:
        raise UserError(f"{row.where}: {column!r} must be a text or one message of the assistant")
    return turns[0].content


def prompt_only(row: SourceRow) -> RawPrompt:
    """A prompt; a response beside it is its reference."""
    prompt, reply, *used = _prompt(row)
    if reply is None and row.holds(column := row.first_of(*RESPONSES)):
        reply = _reply(row, column)
        used.append(column)
    return RawPrompt(prompt, reply, metadata=_metadata(row, used))


def demonstration(row: SourceRow) -> RawDemonstration:
    prompt, reply, *used = _prompt(row)
    if reply is None:
        column = row.first_of(*RESPONSES)
        reply = _reply(row, column)
        used.append(column)
    return RawDemonstration(prompt, reply, metadata=_metadata(row, used))


def _metadata(row: SourceRow, used: Sequence[str]) -> dict[str, Any]:
    # Every row of a Parquet file has all columns; of those named here, a null says that the row has another one.
    empty = [name for name in ("prompt", *DIALOGUES, *RESPONSES) if not row.holds(name)]
    return row.other_than("id", *used, *empty)


# --- Comparisons: chosen and rejected, or several answers ------------------------------------------------------------


def comparison(row: SourceRow) -> RawComparison:
    return ranked(row) if row.holds("responses") else preference(row)


def preference(row: SourceRow) -> RawComparison:
    """`chosen` and `rejected`, as texts or messages; they may begin with the prompt, where no column holds it."""
    texts = [text for column in ("chosen", "rejected") if isinstance(text := row.values.get(column), str)]
    whole = not row.holds(row.first_of("prompt", *DIALOGUES))
    if whole and any(map(is_dialogue, texts)):
        return hh_comparison(row)
    if whole and len(texts) == 2:
        return _shared_beginning(row)
    contexts, answers = zip(*(_answer(row, column) for column in ("chosen", "rejected")), strict=True)
    if contexts[0] != contexts[1]:
        raise SkipRow("different_prompts")
    return RawComparison(_asked(row, contexts[0]), answers, _source(row))


def _answer(row: SourceRow, column: str) -> tuple[tuple[Message, ...], str]:
    """An answer, and the turns before it that the column holds, too."""
    if isinstance(row.get(column), str | None):
        return (), row.text(column).strip()
    turns = dialogue(row, column)
    if turns[-1].role != "assistant":
        raise SkipRow("ends_with_the_human")
    return tuple(turns[:-1]), turns[-1].content


def _asked(row: SourceRow, context: tuple[Message, ...]) -> PromptParts:
    """The prompt of a preference: the turns before its answers, and those of the prompt's own column before these."""
    if not context or isinstance(row.values.get("prompt"), list):
        prompt, reply, _ = _prompt(row)
        if reply is not None and not context:
            raise UserError(
                f"{row.where}: the dialogue of a comparison must end with the user's turn; the answers are 'chosen' "
                "and 'rejected', or 'responses'"
            )
        lead = prompt.messages
        if not context:
            return prompt
        context = context if context[: len(lead)] == lead else (*lead, *context)
    if context[-1].role != "user":
        raise SkipRow("no_question")
    return ChatPrompt(context)


def _shared_beginning(row: SourceRow) -> RawComparison:
    """Two texts whose common beginning, up to its last white space, is the prompt."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    while same and not chosen[same - 1].isspace():
        same -= 1
    prompt, better, worse = chosen[:same], chosen[same:].strip(), rejected[same:].strip()
    if not prompt.strip():
        raise UserError(f"{row.where}: 'chosen' and 'rejected' share no beginning; put it into a column 'prompt'")
    if not better or not worse:
        raise SkipRow("empty_response")
    return RawComparison(plain_prompt(prompt), (better, worse), _source(row))


def ranked(row: SourceRow) -> RawComparison:
    """`responses`, best first, or in the order that `ranking` or `scores` say."""
    prompt, reply, _ = _prompt(row)
    if reply is not None:
        raise UserError(
            f"{row.where}: the dialogue of a comparison must end with the user's turn; the answers are 'responses'"
        )
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{row.where}: 'responses' must be a list of at least two texts, best first")
    order, scores = list(range(len(responses))), None
    if row.holds("ranking"):
        order = row.values["ranking"]
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(responses)))):
            raise UserError(
                f"{row.where}: 'ranking' must name the {len(responses)} responses by their places, from 0, best first"
            )
    elif row.holds("scores"):
        scores = row.values["scores"]
        if not isinstance(scores, list) or len(scores) != len(responses) or not all(map(_is_number, scores)):
            raise UserError(f"{row.where}: 'scores' must be a number for each of the {len(responses)} responses")
        order.sort(key=lambda i: -scores[i])
        if scores[order[0]] == scores[order[-1]]:
            raise SkipRow("equal_scores")
    return RawComparison(
        prompt,
        tuple(responses[i].strip() for i in order),
        _source(row),
        None if scores is None else tuple(float(scores[i]) for i in order),
    )


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _source(row: SourceRow) -> str:
    return str(row.values.get("source") or "")


# --- Labelled answers: TRL's unpaired preferences --------------------------------------------------------------------


def labelled(row: SourceRow) -> RawLabelled:
    prompt, reply, _ = _prompt(row)
    column = row.first_of("completion", "response")
    if reply is None:
        reply = _reply(row, column)
    elif row.holds(column):
        raise UserError(f"{row.where}: the dialogue ends with a reply and there is a {column!r}, too; remove one")
    good = verdict(row.get("label"))
    if good is None:
        found = row.values["label"]
        raise UserError(f"{row.where}: 'label' must be true (a good answer) or false (a bad one), found {shown(found)}")
    return RawLabelled(prompt, reply, good, _source(row))


def verdict(label: Any) -> bool | None:
    """What a label says; None if it says neither."""
    key = label.strip().lower() if isinstance(label, str) else label
    return _LABELS.get(key) if isinstance(key, str | bool | int | float) else None


def good_answer(row: SourceRow) -> RawDemonstration:
    raw = labelled(row)
    if not raw.good:
        raise SkipRow("bad_answer")
    return RawDemonstration(raw.prompt, raw.response)


def unlabelled_prompt(row: SourceRow) -> RawPrompt:
    """The prompt of a labelled answer, which is its reference if it is good."""
    raw = labelled(row)
    return RawPrompt(raw.prompt, raw.response if raw.good else None)


# --- Alpaca: instruction, input, output; and ShareGPT: conversations -------------------------------------------------


def alpaca(row: SourceRow) -> RawDemonstration:
    """An instruction, perhaps with an input, is a user's turn; `history` holds turns before it, `system` what led."""
    raw = alpaca_prompt(row)
    return RawDemonstration(raw.prompt, row.text("output").strip(), metadata=raw.metadata)


def alpaca_prompt(row: SourceRow) -> RawPrompt:
    system = row.values.get("system")
    turns = [Message("system", row.text("system").strip())] if system and str(system).strip() else []
    history = row.values.get("history") or ()
    for past in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(past, list) or len(past) != 2 or not all(isinstance(text, str) for text in past):
            raise UserError(f"{row.where}: 'history' must be a list of [instruction, answer] pairs")
        turns += [Message("user", past[0].strip()), Message("assistant", past[1].strip())]
    given = row.text("input", allow_empty=True).strip() if "input" in row.values else ""
    turns.append(Message("user", "\n\n".join(filter(None, (row.text("instruction").strip(), given)))))
    output = row.values.get("output")
    metadata = row.other_than("id", "instruction", "input", "output", "system", "history")
    return RawPrompt(ChatPrompt(tuple(turns)), str(output).strip() or None if output else None, metadata=metadata)


def sharegpt(row: SourceRow) -> RawDemonstration:
    """A published dialogue; those that end with the human have no answer to learn from."""
    raw = sharegpt_prompt(row)
    if raw.reference is None:
        raise SkipRow("ends_with_the_human")
    return RawDemonstration(raw.prompt, raw.reference, metadata=raw.metadata)


def sharegpt_prompt(row: SourceRow) -> RawPrompt:
    turns = dialogue(row, "conversations")
    if row.holds("system"):
        turns.insert(0, Message("system", row.text("system").strip()))
    reply = turns.pop().content if turns[-1].role == "assistant" else None
    if not turns or turns[-1].role != "user":
        raise SkipRow("no_question")
    return RawPrompt(ChatPrompt(tuple(turns)), reply, metadata=row.other_than("id", "conversations", "system"))
