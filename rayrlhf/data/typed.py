"""What a person types becomes a prompt: a turn of a dialogue, a post to be summed up, or the prompt itself.

    chat    a user's turn behind those before it, through the tokenizer's chat template or as HH-RLHF writes dialogues
    post    the body of the published TL;DR template; of several lines, the first is the title
    text    the prompt as it is typed

Which of them a model knows, its training prompts tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rayrlhf.data import published
from rayrlhf.data.records import Message
from rayrlhf.data.template import (
    ChatPrompt,
    PromptParts,
    TextPrompt,
    cleaner,
    fit_prompts,
    tldr_prompt,
    told_first,
)
from rayrlhf.data.tokens import leading_ids
from rayrlhf.data.turns import SPEAKERS, cue
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT, POST, TEXT = TEMPLATES = ("chat", "post", "text")
_SUBREDDIT = "AskReddit"
"""The template has a subreddit, and nobody types one."""


def check_template(name: str) -> str:
    """
    Raises:
        UserError: there is no template of that name.
    """
    if name not in TEMPLATES:
        raise UserError(f"--template {name!r} must be one of {', '.join(TEMPLATES)}")
    return name


def template_of(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> str:
    """The template that a run's rendered prompts have.

    Args:
        tokenizer: of the run.
        prompts: some of them; the first decides. Without any, a tokenizer with a chat template stands for `chat`.
    """
    ending = cue(tokenizer)
    prompt = next(iter(prompts), None)
    if prompt is None:
        return TEXT if ending is None else CHAT
    if (ending and prompt.endswith(ending)) or published.is_dialogue(prompt):
        return CHAT
    return POST if published.RENDERED_POST.fullmatch(prompt) else TEXT


def chat_template_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """A chat template that makes of messages what `Typist` makes of what is typed; None if the tokenizer has its own.

    A server needs one for chat completions. The templates `post` and `text` read the last message alone, and `post`
    has no title.
    """
    if tokenizer.chat_template:
        return None
    lead = "{{ bos_token }}" if leading_ids(tokenizer) else ""
    last = "{{ messages[-1]['content'] | trim }}"
    post = tldr_prompt(_SUBREDDIT, "", last)
    names = ", ".join(f"'{role}': '{name}'" for role, name in SPEAKERS.items())
    turns = "{% for m in messages %}{{ '\\n\\n' + names[m['role']] + ': ' + m['content'] }}{% endfor %}"
    body = {
        CHAT: f"{{% set names = {{{names}}} %}}{turns}{{{{ '\\n\\nAssistant:' }}}}",
        POST: f"{post.head}{last}{post.tail}",
        TEXT: "{{ messages[-1]['content'] }}",
    }
    return lead + body[template]


class Typist:
    """Makes prompts of what is typed, as one template has it, and keeps the dialogue where there is one."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int, system: str | None = None
    ) -> None:
        """
        Args:
            tokenizer: of the models that answer.
            template: one of `TEMPLATES`.
            max_tokens: of a prompt. A longer one is cut as those of a run are: a dialogue loses its oldest turns.
            system: put before every prompt, see `told_first`; None for none.
        """
        self.tokenizer, self.template, self.max_tokens, self.system = tokenizer, template, max_tokens, system
        self._clean = cleaner(tokenizer)

    def prompt(self, typed: str, before: Sequence[Message] = ()) -> tuple[tuple[int, ...], bool]:
        """Token ids of the prompt, and whether something had to be cut.

        Args:
            typed: by the person.
            before: the turns of the dialogue so far; only the template `chat` has them.

        Raises:
            UserError: nothing was typed, the prompt does not fit, or the chat template refuses it.
        """
        parts = self._clean(self._parts(typed, before))
        if parts.blank:
            raise UserError("an empty prompt; type something")
        if self.system:
            parts = told_first(self.tokenizer, self.system, parts)
        (fitted,) = fit_prompts(self.tokenizer, [parts], self.max_tokens, ["what was typed"])
        return fitted.ids, fitted.tokens > self.max_tokens

    def _parts(self, typed: str, before: Sequence[Message]) -> PromptParts:
        if self.template == CHAT:
            return ChatPrompt((*before, Message("user", typed)))
        if self.template == TEXT:
            return TextPrompt("", typed, "")
        title, _, post = typed.strip().partition("\n")
        return tldr_prompt(_SUBREDDIT, title if post else "", post or title)

    @property
    def words(self) -> str:
        """How what is typed is read, for people."""
        return {
            CHAT: "a turn of a dialogue, through "
            + ("the chat template" if self.tokenizer.chat_template else "Human: and Assistant:"),
            POST: "a post to be summed up, in the TL;DR template; of several lines, the first is its title",
            TEXT: "the prompt itself, which the models go on writing",
        }[self.template]
