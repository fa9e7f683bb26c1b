"""What a judge is asked, and how its reply is read.

Texts of others stand behind "> ", line by line. So a line such as "Answer B:" inside a response cannot be taken for
ours; that a response talks the judge into something is not prevented by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Kind(NamedTuple):
    """A sort of question."""

    wanted: str
    """What the reply has to be."""
    read: Callable[[str], float | None]
    """The value of a reply, from 0 to 1; None if it says nothing, or more than one thing."""
    remedy: str
    """What makes vLLM reply with nothing else: a value of `body`."""


class Question(NamedTuple):
    """One question to a judge."""

    kind: Kind
    text: str
    about: str
    """Whose answer it is about, for errors."""


def rate(rubric: str, prompt: str, response: str, about: str) -> Question:
    """How good a response is by itself: a tenth of the judge's number from 0 to 10."""
    return Question(
        RATING,
        f"{rubric}\n\nQuestion:\n{_quoted(prompt)}\n\nAnswer:\n{_quoted(response)}\n\n"
        f"Rate the answer. Reply with {RATING.wanted} and nothing else.",
        about,
    )


def prefer(rubric: str, prompt: str, a: str, b: str, about: str) -> Question:
    """Whether response a is better than b: 1 if it is, 0 if b is, 0.5 if they are equally good."""
    return Question(
        PREFERENCE,
        f"{rubric}\n\nQuestion:\n{_quoted(prompt)}\n\nAnswer A:\n{_quoted(a)}\n\nAnswer B:\n{_quoted(b)}\n\n"
        f"Which answer is better? Reply with {PREFERENCE.wanted} and nothing else; "
        "reply with C if they are equally good.",
        about,
    )


def again(question: Question, said: str) -> str:
    """The text of a second try, which is not the same question: to that, a judge at temperature 0 replies the same."""
    return f"{question.text}\n\nYou replied {said[:200]!r}. Reply with {question.kind.wanted} and nothing else."


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


_LEAD = (
    r"(?i:(?:the|my|final|overall|better|best|preferred|answer|response|option|choice|verdict|winner|rating|score|"
    r"grade|is)[\s:=]*)*"
)
"""Words before a verdict, as in "**Rating**: 8" and "The better answer is B"."""
_DECORATION = re.compile(r"[*_`\"'“”#>()\[\]{}$\\]")
_REST = r"(?:[{}](?P<rest>\s.*)?)?"
_RATING = re.compile(rf"{_LEAD}(?P<value>\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?\s*\.?{_REST.format(':,;!–—-')}")
_PREFERENCE = re.compile(rf"{_LEAD}(?P<value>[ABC])(?: is better| wins)?\s*{_REST.format('.:,;!–—-')}")


def _verdict(said: str, line: re.Pattern[str], another: str) -> str | None:
    """The one verdict in the lines of a reply.

    Args:
        said: the reply. What a reasoning model thinks before it is left out, also where its thoughts were cut.
        line: what a line with a verdict looks like. Other lines are its reasons.
        another: what may not stand behind a verdict in its line: "A. Or is it B?" is none.
    """
    found = set()
    for text in said.rpartition("</think>")[2].partition("<think>")[0].splitlines():
        match = line.fullmatch(_DECORATION.sub("", text).strip())
        if match and not re.search(another, match["rest"] or ""):
            found.add(match["value"])
    return found.pop() if len(found) == 1 else None


def _rating(said: str) -> float | None:
    number = _verdict(said, _RATING, r"\d")
    return float(number) / 10 if number is not None and float(number) <= 10 else None


def _preference(said: str) -> float | None:
    return {"A": 1.0, "B": 0.0, "C": 0.5}.get(_verdict(said, _PREFERENCE, r"\b[ABC]\b") or "")


RATING = Kind(
    "a whole number from 0 (worst) to 10 (best)", _rating, 'structured_outputs: {regex: "10|[0-9]"}'
)  # fmt: skip
PREFERENCE = Kind("A, B or C", _preference, "structured_outputs: {choice: [A, B, C]}")
