"""All answers of report.html: those of the evaluation, and those to dev prompts while `rl` ran.

A row has a prompt and the answers of each source. The answer of the first model and that of the last one are cut where
they differ, word by word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel

from rayrlhf.data.words import pieces
from rayrlhf.reports.measures import SOURCES
from rayrlhf.reports.progress import headline
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.reading import read_json_lines

NUMBERS = {"gold": "gold", "reward": "reward", "score": "score", "length": "tokens", "kl": "KL"}
"""What is shown beside an answer, in this order; one that ends without EOS says so."""
FROM, TO = "sft", "policy"


@dataclass(frozen=True)
class Answer:
    """One source's answer."""

    parts: list[str]
    """The text, cut; every second part, from the second one on, is not in the text that it is compared with."""
    numbers: dict[str, float]
    ended: bool = True


@dataclass(frozen=True)
class Row:
    """One prompt with its answers, by source."""

    id: str
    head: str
    prompt: str
    answers: dict[str, Answer]
    gain: float | None = None
    """By how much the last model's answer is better: in gold, or else in reward."""
    change: float | None = None
    """1 minus the share of words that the two answers have in common; 0 for equal ones."""
    length: float | None = None
    """Of the last model's answer, tokens."""


@dataclass(frozen=True)
class Collection:
    """Rows that have the same sources."""

    name: str
    words: str
    sources: dict[str, str]
    """In words, by name, in the order in which they are shown."""
    measure: str
    """What `gain` is measured by; empty where nothing measures."""
    old: str
    """The source that the newest one is compared with."""
    new: str
    rows: list[Row]

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Look(BaseModel):
    """A line of `samples/step_N.jsonl`, which may have more."""

    step: int
    id: str
    prompt: str
    answer: str
    reference: str | None = None
    gold: float | None
    score: float | None
    tokens: float | None = None
    ended: bool = True


def evaluated(table: Sequence[Mapping[str, Any]]) -> Collection | None:
    """The rows of samples.parquet; None without any."""
    if not table:
        return None
    first = table[0]
    order = ("reference", *(name for name in SOURCES if name != "reference"))
    sources = {name: SOURCES[name].in_full for name in order if name in first}
    new = TO if TO in sources else FROM
    measure = next((m for m in ("gold", "reward") if f"{m}_{FROM}" in first and f"{m}_{new}" in first), "")
    rows = []
    for row in table:
        own = {name: {m: row.get(f"{m}_{name}") for m in NUMBERS} for name in sources}
        texts = {name: row[name] for name in sources if row[name] is not None}
        ended = {name: row.get(f"eos_rate_{name}") != 0.0 for name in sources}
        rows.append(_row(str(row["id"]), str(row["post"]), texts, own, ended, (FROM, new), measure))
    return Collection("evaluation", f"Evaluation: {len(rows)} prompts", sources, measure, FROM, new, rows)


def while_rl_ran(run: RunFolder, best_step: int | None) -> Collection | None:
    """The answers to a few dev prompts at every look of `rl`; None where there are none.

    Args:
        run: the run.
        best_step: the step whose policy was published, where `rl.select` chose one.
    """
    if run.store and run.store.exists(run.dev_samples):
        run.download(run.dev_samples)
    looks = []
    for file in sorted(run.dev_samples.glob("step_*.jsonl")):
        lines = read_json_lines(file.read_bytes(), run.address_of(file), _Look)
        looks += [lines] if lines else []
    if not looks:
        return None
    steps = [look[0]["step"] for look in looks]
    published = (steps[-1] if best_step is None else best_step) if run.done("rl") else None
    sources = {"reference": SOURCES["reference"].in_full}
    sources |= {f"step {step}": f"step {step}" + (", the policy" if step == published else "") for step in steps}
    old, new = f"step {steps[0]}", f"step {steps[-1] if published not in steps else published}"
    measure = "gold" if all(row["gold"] is not None for look in looks for row in look) else "score"
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in (row for look in looks for row in look):  # looks may differ in their number of prompts
        by_prompt.setdefault(str(row["id"]), []).append(row)
    rows = []
    for prompt, own in by_prompt.items():
        texts = {f"step {row['step']}": row["answer"] for row in own}
        if own[0].get("reference"):
            texts["reference"] = own[0]["reference"]
        numbers = {
            f"step {row['step']}": {"gold": row["gold"], "score": row["score"], "length": row.get("tokens")}
            for row in own
        }
        ended = {f"step {row['step']}": row.get("ended", True) for row in own}
        rows.append(_row(prompt, own[0]["prompt"], texts, numbers, ended, (old, new), measure))
    words = f"While rl ran: {len(rows)} dev prompts, {len(steps)} looks"
    return Collection("dev", words, sources, measure, old, new, rows)


def differences(old: str, new: str) -> tuple[list[str], list[str], float]:
    """Both texts cut where they differ, and the share of words that differ.

    The parts of each text join to it. Every second one, from the second on, is not in the other text.

    >>> differences("a cat sat", "a dog sat")
    (['a', ' cat', ' sat'], ['a', ' dog', ' sat'], 0.33333333333333337)
    """
    left, right = pieces(old), pieces(new)
    # difflib takes equal pieces; the blanks before them do not count.
    matcher = SequenceMatcher(None, [piece.strip() for piece in left], [piece.strip() for piece in right])
    cut: tuple[list[str], list[str]] = ([""], [""])
    for kind, a, b, c, d in matcher.get_opcodes():
        for parts, piece in zip(cut, ("".join(left[a:b]), "".join(right[c:d])), strict=True):
            differs = kind != "equal"
            if not piece:
                continue
            if differs == (len(parts) % 2 == 0):
                parts[-1] += piece
            else:
                parts.append(piece)
    return *cut, 1 - matcher.ratio()


def _row(
    name: str,
    prompt: str,
    texts: Mapping[str, str],
    numbers: Mapping[str, Mapping[str, float | None]],
    ended: Mapping[str, bool],
    compared: tuple[str, str],
    measure: str,
) -> Row:
    old, new = compared
    parts = {source: [text.strip()] for source, text in texts.items()}
    change = None
    if old != new and old in texts and new in texts:
        parts[old], parts[new], change = differences(texts[old].strip(), texts[new].strip())
    known = {
        source: {m: _short(values[m]) for m in NUMBERS if values.get(m) is not None}
        for source, values in numbers.items()
    }
    before, after = (known.get(source, {}).get(measure) for source in compared)
    gain = _short(after - before) if before is not None and after is not None and old != new else None
    answers = {source: Answer(parts[source], known.get(source, {}), ended.get(source, True)) for source in texts}
    return Row(name, headline(prompt), prompt.strip(), answers, gain, change, known.get(new, {}).get("length"))


def _short(value: float | None) -> float:
    """A number with as many digits as the page can show."""
    return float(f"{value:.5g}")
