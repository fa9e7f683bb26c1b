"""The rows of data sets that many use. A bad row, which nobody can mend, is skipped and counted."""

from __future__ import annotations

import re

from rayrlhf.data.files import SourceRow
from rayrlhf.data.raw import RawComparison, RawDemonstration, SkipRow
from rayrlhf.data.records import Message
from rayrlhf.data.template import ChatPrompt, TextPrompt, tldr_prompt
from rayrlhf.errors import UserError
from rayrlhf.wording import shown

# --- tldr: subreddit, title, post, summary, [id] ---------------------------------------------------------------------


def tldr(row: SourceRow) -> RawDemonstration:
    title = row.text("title", allow_empty=True)
    prompt = tldr_prompt(row.text("subreddit", allow_empty=True), title, row.text("post"))
    metadata = row.other_than("id", "subreddit", "title", "post", "summary")
    return RawDemonstration(prompt, row.text("summary").strip(), title.strip() or None, metadata)


# --- CarperAI/openai_summarize_{tldr,comparisons}: posts already rendered, with single newlines ----------------------

RENDERED_POST = re.compile(
    r"\s*SUBREDDIT:[ \t]*(?:r/)?(?P<subreddit>[^\n]*?)\s+TITLE:(?P<title>.*?)\sPOST:(?P<post>.*?)(?:TL;DR:\s*)?",
    re.DOTALL,
)


def _rendered_post(row: SourceRow) -> tuple[TextPrompt, str | None]:
    match = RENDERED_POST.fullmatch(row.text("prompt"))
    if match is None or not match["post"].strip():
        raise SkipRow("not_a_tldr_post")
    title = match["title"].strip()
    return tldr_prompt(match["subreddit"], title, match["post"]), title or None


def _summary(row: SourceRow, column: str) -> str:
    """The summary of a column. Some rows repeat `TL;DR:`, which already ends the prompt, so it is taken off."""
    summary = row.text(column, allow_empty=True).strip().removeprefix("TL;DR:").strip()
    if not summary:
        raise SkipRow("empty_response")
    return summary


def openai_tldr(row: SourceRow) -> RawDemonstration:
    prompt, title = _rendered_post(row)
    return RawDemonstration(prompt, _summary(row, "label"), title)


def openai_comparison(row: SourceRow) -> RawComparison:
    return RawComparison(_rendered_post(row)[0], (_summary(row, "chosen"), _summary(row, "rejected")))


# --- Anthropic/hh-rlhf: chosen and rejected are whole dialogues that differ in the last reply ------------------------

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_REPLY = "\n\nAssistant:"
_ASKED = "\n\nHuman:"


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """Parse `\\n\\nHuman: ..\\n\\nAssistant: ..` into messages. Successive turns of one speaker become one turn."""
    before, *parts = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not parts:
        raise SkipRow("not_a_dialogue")
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, f"{messages[-1].content}\n\n{content}".strip())
        else:
            messages.append(Message(role, content))
    return tuple(messages)


def is_dialogue(text: str) -> bool:
    """Whether a text is a whole dialogue with a reply, as HH-RLHF writes it."""
    return ("\n\n" + text.lstrip()).startswith(_ASKED) and _REPLY in text


def hh_comparison(row: SourceRow) -> RawComparison:
    chosen, rejected = row.text("chosen", allow_empty=True), row.text("rejected", allow_empty=True)
    if not chosen.strip() or not rejected.strip():
        raise SkipRow("empty_response")
    context, _, better = chosen.rpartition(_REPLY)
    other, _, worse = rejected.rpartition(_REPLY)
    if _ASKED in better or _ASKED in worse:  # else the model would learn to write the human's turn
        raise SkipRow("ends_with_the_human")
    if context != other:
        raise SkipRow("different_prompts")
    if not better.strip() or not worse.strip():
        raise SkipRow("empty_response")
    messages = parse_dialogue(context)
    if messages[-1].role != "user" or not messages[-1].content:
        raise SkipRow("no_question")
    return RawComparison(ChatPrompt(messages), (better.strip(), worse.strip()))


# --- stanfordnlp/SHP: a Reddit post and two comments, labels 1 where A got more votes --------------------------------


def shp_comparison(row: SourceRow) -> RawComparison:
    a, b = row.text("human_ref_A", allow_empty=True).strip(), row.text("human_ref_B", allow_empty=True).strip()
    history = row.text("history", allow_empty=True).strip()
    if not history or not a or not b:
        raise SkipRow("empty_response" if history else "no_question")
    label = row.get("labels")
    if label not in (0, 1, "0", "1"):  # text, too: CSV has nothing else
        raise UserError(f"{row.where}: 'labels' must be 1 (A preferred) or 0 (B preferred), found {shown(label)}")
    domain = row.values.get("domain")  # the subreddit
    return RawComparison(
        ChatPrompt((Message("user", history),)), (a, b) if int(label) else (b, a), str(domain) if domain else ""
    )
