"""Asks a judge, a language model behind an OpenAI-compatible endpoint, and remembers what it said.

A reply that cannot be read is asked for once more, in other words. If that fails too, the question has no value.
One such question ends no run; more than `max_unusable` of them do, and so do questions that all have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rayrlhf.config_services import JudgeSection
from rayrlhf.errors import UserError
from rayrlhf.rewards.judge_questions import Question, again
from rayrlhf.rewards.judge_replies import Replies
from rayrlhf.rewards.posting import post_all, token_of

FEW = 1000
"""Up to so many questions `max_unusable` is the share of so many: the third question may well be the first bad one."""

ROUNDS = 8
"""Times the section's `concurrency` are the questions after which `max_unusable` is looked at: a judge that never says
what it is asked for is found out before thousands of questions are paid for."""


class Verdict(NamedTuple):
    """The outcome of a question."""

    value: float | None
    """From 0 to 1; None if the judge gave no usable reply."""
    tokens: int
    """Read and written for it by this call: 0 where the reply was known."""


class JudgeClient:
    """One judge, as one process asks it. Equal questions are asked once."""

    def __init__(self, section: JudgeSection, role: str) -> None:
        """`role` is what it is to the run, for errors."""
        self.section = section
        self.place = f"{role} (judge {section.model} at {section.url})"
        self.counts = Counter[str]()
        """Of questions: `questions` that were put to this object, `kept` ones among them that had their reply on disk,
        `unusable` ones without a value. `tokens` that the judge has read and written."""
        self._replies = Replies(section.cache)
        self._known: dict[str, float | None] = {}
        """Values by the text of the question."""

    def check(self) -> None:
        """See what can be seen before the first question.

        Raises:
            UserError: the environment variable of the token is not set on this node.
        """
        token_of(self.section, self.place)

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """The verdict on each question, in order.

        Raises:
            UserError: the judge does not answer, or too many of its replies are unusable. Replies that came before
                are not lost: this object has them, and so has the disk, if the section names a `cache`.
        """
        new = list({q.text: q for q in questions if q.text not in self._known}.values())
        tokens = Counter[str]()
        size = ROUNDS * self.section.concurrency
        try:
            for start in range(0, len(new), size):
                self._ask(new[start : start + size], tokens)
        except UserError as error:
            paid = sum(q.text in tokens and self._known.get(q.text) is not None for q in new)
            where = f"kept in {self.section.cache}" if self._replies.keeps else "lost, which `cache: DIR` prevents"
            raise UserError(f"{error}; {paid} replies of this call are {where}" if paid else str(error)) from None
        return [Verdict(self._known[q.text], tokens.pop(q.text, 0)) for q in questions]

    def _ask(self, questions: Sequence[Question], tokens: Counter[str]) -> None:
        """Find the values of a part of the questions; adds to `tokens` by the text of the question."""
        before = tokens.total()
        missing = [question for question in questions if not self._recall(question)]
        said = self._post({question: question.text for question in missing}, tokens)
        said = self._post({question: again(question, reply) for question, reply in said.items()}, tokens)
        for question in said:
            self._known[question.text] = None
        self.counts.update(unusable=len(said), tokens=tokens.total() - before)
        self._limit(said)

    def _recall(self, question: Question) -> bool:
        """Whether the disk has a reply to the question."""
        self.counts["questions"] += 1
        reply = self._replies.get(self._key(question))
        value = None if reply is None else question.kind.read(reply)
        if value is None:
            return False
        self._known[question.text] = value
        self.counts["kept"] += 1
        return True

    def _post(self, texts: Mapping[Question, str], tokens: Counter[str]) -> dict[Question, str]:
        """Ask, and note what is usable as soon as it comes. Returns the replies that are not."""
        asked, unusable = list(texts), dict[Question, str]()

        def received(index: int, answer: Any) -> None:
            question = asked[index]
            reply = _content(answer, self.place)
            tokens[question.text] += int((answer.get("usage") or {}).get("total_tokens") or 0)
            value = question.kind.read(reply)
            if value is None:
                unusable[question] = reply
            else:
                self._known[question.text] = value
                self._replies.put(self._key(question), reply)

        bodies = [self._body(text) for text in texts.values()]
        post_all(self.section, self.place, bodies, "/chat/completions", received)
        return unusable

    def _body(self, text: str) -> dict[str, Any]:
        return {
            "model": self.section.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self.section.max_tokens,
            **self.section.body,
        }

    def _key(self, question: Question) -> str:
        return Replies.key(self.section.url.rstrip("/"), self._body(question.text))

    def _limit(self, said: Mapping[Question, str]) -> None:
        unusable, questions = self.counts["unusable"], self.counts["questions"]
        if not said or (unusable < questions and unusable <= self.section.max_unusable * max(questions, FEW)):
            return
        question, reply = next(iter(said.items()))
        raise UserError(
            f"{self.place} said {reply[:80]!r} of {question.about}, when asked twice for {question.kind.wanted}; "
            f"{unusable} of {questions} questions got no usable reply. With vLLM, "
            f"body: {{{question.kind.remedy}}} has it reply with nothing else; a judge that reasons needs more "
            f"max_tokens than {self.section.max_tokens}"
        )


def _content(answer: Any, place: str) -> str:
    try:
        return str(answer["choices"][0]["message"]["content"] or "").strip()
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{place}: no OpenAI chat completion: {str(answer)[:200]}") from None
