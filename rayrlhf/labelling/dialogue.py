"""A rendered prompt as the turns of a dialogue, for people to read."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_ROLE = "|".join(_ROLES)
_OPENING = re.compile(
    rf"(?:^|\n\n)(?P<plain>Human|Assistant|System):[ ]?"  # a plain dialogue, as HH-RLHF writes it
    rf"|<\|im_start\|>(?P<chatml>{_ROLE})\n"  # ChatML: Qwen, SmolLM and many others
    rf"|<\|start_header_id\|>(?P<llama>{_ROLE})<\|end_header_id\|>\n*"  # Llama 3
    rf"|<start_of_turn>(?P<gemma>{_ROLE})\n"  # Gemma
    rf"|<\|(?P<bars>{_ROLE})\|>\n?"  # Zephyr, Phi
)
_CLOSING = re.compile(r"(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|</s>)\s*$")
_BEGINNING = re.compile(r"^(?:<\|begin_of_text\|>|<bos>|<s>)")


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    """`user`, `assistant` or `system`; empty for a text that is no dialogue."""
    text: str


def turns(prompt: str) -> list[Turn]:
    """Split a rendered prompt at the marks of common chat templates. A prompt without any is one turn without a role.

    The turn that the assistant is to write is left out.
    """
    prompt = _BEGINNING.sub("", prompt)
    openings = list(_OPENING.finditer(prompt))
    if not openings:
        return [Turn("", prompt)]
    ends = [opening.start() for opening in openings[1:]] + [len(prompt)]
    found = [Turn("", prompt[: openings[0].start()].strip())]
    for opening, end in zip(openings, ends, strict=True):
        role = next(name for name in opening.groupdict().values() if name)
        found.append(Turn(_ROLES[role.lower()], _CLOSING.sub("", prompt[opening.end() : end]).strip()))
    return [turn for turn in found if turn.text]
