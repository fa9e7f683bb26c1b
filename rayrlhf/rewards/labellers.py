"""Labellers rank the answers that the stage `collect` has sampled.

`reference` ranks by the words that an answer shares with the author's own: an honest stand-in for people, not their
judgement. `scripts/compare_labellers.py` compares such measures.
`people` waits for people who rank on a page, and `file` reads their rankings from a JSONL file. `python` ranks by a
function in a file of the user's own. `judge` asks a language model.

Another labeller is a section of the config, a class with `name`, `rank` and `measure`, and a row of `LABELLERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rayrlhf.config_labellers import (
    FileLabellerConfig,
    LabellerConfig,
    PythonLabellerConfig,
    ReferenceLabellerConfig,
)
from rayrlhf.config_rewards import PythonReward
from rayrlhf.data.files import json_lines
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.labelling.judgements import ungrouped
from rayrlhf.plugins import Plugin
from rayrlhf.rewards.content import Vocabulary, content
from rayrlhf.rewards.judge_labeller import JudgeLabeller
from rayrlhf.rewards.labeller import LabelledRanking, Labeller
from rayrlhf.rewards.people_labeller import PeopleLabeller
from rayrlhf.rewards.python import PythonFunction
from rayrlhf.rewards.rouge import rouge_l
from rayrlhf.runs.folder import RunFolder
from rayrlhf.trajectory import GenerationRequest
from rayrlhf.wording import in_a_line, shown

REFERENCE_MEASURES: dict[str, Callable[[Vocabulary, str, str, str], float]] = {
    "content": content,
    "rouge_l": lambda vocabulary, prompt, reference, answer: rouge_l(reference, answer),
}
"""In [0, 1], of vocabulary, prompt, reference and answer; by the `measure` of the labeller's section."""


class ReferenceLabeller(Labeller):
    """A measure of an answer beside the author's own TL;DR: an honest stand-in for people."""

    name = "reference"

    def __init__(self, config: ReferenceLabellerConfig) -> None:
        self._of = REFERENCE_MEASURES[config.measure]

    def rank(self, prompt: Prompt, answers: Sequence[str]) -> LabelledRanking:
        return LabelledRanking.by([self._score(prompt, answer) for answer in answers])

    def measure(self, prompt: Prompt, answer: str) -> float | None:
        return None if prompt.reference is None else self._score(prompt, answer)

    def _score(self, prompt: Prompt, answer: str) -> float:
        if prompt.reference is None:
            raise UserError(
                f"prompt {prompt.id!r} has no reference, which collect.labeller.kind=reference compares with; "
                "add references or use kind: file"
            )
        return self._of(self.vocabulary, prompt.text, prompt.reference, answer)


class FileLabeller(Labeller):
    """The rankings of people, from a file with a line such as `{"id": "...", "ranking": [2, 0, 1]}` for each prompt.

    The numbers are indices of the answers, best first; a list of several in place of one is a tie, `[2, [0, 1]]`. Of
    answers with the ranking null, nobody knows which are better.

    Raises:
        UserError: from `prepare`: there is no such file, a line is malformed, or a ranking does not fit. It names file
            and line.
    """

    name = "people"

    asks_people = True

    def __init__(self, config: FileLabellerConfig) -> None:
        self._path = Path(config.path).expanduser()
        self._rankings: dict[str, tuple[int, Any]] = {}

    def prepare(self, waiting: Sequence[tuple[Prompt, Sequence[str]]], run: RunFolder) -> None:
        """Read the file, and check that it ranks exactly these prompts."""
        if not self._path.is_file():
            raise UserError(
                f"{len(waiting)} prompts with answers to rank were written to {run.to_rank}; put one line "
                f'{{"id": "...", "ranking": [best, ..., worst]}} a prompt into {self._path} '
                "(indices into its answers, from 0) and run collect again"
            )
        self._read()
        expected = {prompt.id: len(answers) for prompt, answers in waiting}
        for id, (number, _) in self._rankings.items():
            if id not in expected:
                raise UserError(
                    f"{self._path} line {number}: id {shown(id)} is not among the prompts to rank; remove the line"
                )
            self._ranks(id, expected[id])
        missing = [id for id in expected if id not in self._rankings]
        if missing:
            raise UserError(
                f"{self._path}: {len(missing)} of {len(expected)} prompts have no ranking, first {shown(missing[0])}; "
                "add a line for each"
            )

    def rank(self, prompt: Prompt, answers: Sequence[str]) -> LabelledRanking:
        if prompt.id not in self._rankings:
            raise UserError(f"{self._path}: no ranking for prompt {prompt.id!r}; add a line for it")
        ranks = self._ranks(prompt.id, len(answers))
        if ranks is None:
            return LabelledRanking.none(len(answers))
        ranking = LabelledRanking.by([-float(rank) for rank in ranks])
        return ranking if len(set(ranks)) < len(ranks) else LabelledRanking(ranking.order, None)

    def measure(self, prompt: Prompt, answer: str) -> float | None:
        return None

    def _read(self) -> None:
        for number, row in _json_lines(self._path):
            where = f"{self._path} line {number}"
            if not isinstance(row.get("id"), str) or "ranking" not in row:
                raise UserError(f'{where}: expected {{"id": "...", "ranking": [best, ..., worst]}}')
            if row["id"] in self._rankings:
                raise UserError(
                    f"{where}: id {shown(row['id'])} was ranked before, in line {self._rankings[row['id']][0]}; "
                    "keep one"
                )
            self._rankings[row["id"]] = (number, row["ranking"])

    def _ranks(self, id: str, count: int) -> tuple[int, ...] | None:
        """[K] of the answers, equal ranks are a tie; None where people could not rank them."""
        number, ranking = self._rankings[id]
        if ranking is None:
            return None
        ranks = ungrouped(ranking, count)
        if ranks is None:
            raise UserError(
                f"{self._path} line {number}: ranking {shown(ranking)} of {shown(id)} must hold each of "
                f"0..{count - 1} once"
            )
        return ranks


class PythonLabeller(Labeller):
    """Ranks by the scores of a function, higher is better; it is told all that a reward is but token ids.

    Raises:
        UserError: the file or the function does not fit; from `rank` and `measure`: it raised, or gave no number.
    """

    name = "python"

    def __init__(self, config: PythonLabellerConfig) -> None:
        section = PythonReward(name="python", path=config.path, settings=config.settings)
        plugin = Plugin.read(config.path, "collect.labeller.path")
        self.function = PythonFunction(section, plugin, "labeller", ("prompts", "responses", "references", "metadata"))
        self.function.load()

    def rank(self, prompt: Prompt, answers: Sequence[str]) -> LabelledRanking:
        return LabelledRanking.by(self._scores(prompt, answers))

    def measure(self, prompt: Prompt, answer: str) -> float | None:
        return self._scores(prompt, [answer])[0]

    def _scores(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        count = len(answers)
        told = {
            "prompts": [prompt.text] * count,
            "responses": answers,
            "references": [prompt.reference] * count,
            "metadata": [prompt.metadata] * count,
        }
        return self.function([GenerationRequest(prompt.id, (), i) for i in range(count)], told)


LABELLERS: dict[str, Callable[[Any], Labeller]] = {
    "reference": ReferenceLabeller,
    "file": FileLabeller,
    "people": PeopleLabeller,
    "python": PythonLabeller,
    "judge": JudgeLabeller,
}
"""By the kind of their section, with which they are made."""


def check_labeller(config: LabellerConfig) -> None:
    """Check the settings before answers are sampled.

    Raises:
        UserError: the function of `python` cannot be read; the token of `judge` is not there.
    """
    make_labeller(config)


def make_labeller(config: LabellerConfig, vocabulary: Vocabulary = Vocabulary()) -> Labeller:  # noqa: B008 - frozen
    """Make the labeller that `config.kind` names.

    Args:
        config: its section.
        vocabulary: how common words are in the run's demonstrations. Without it all words weigh alike.

    Raises:
        UserError: as `check_labeller`.
    """
    labeller = LABELLERS[config.kind](config)
    labeller.vocabulary = vocabulary
    return labeller


# --- Asking people: answers go out in `to_rank.jsonl`, which the page and other programs read -------------------------


@dataclass(frozen=True)
class Unranked:
    """The answers to one prompt that wait for a ranking by people.

    They keep their token ids: text is never tokenised twice.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[tuple[int, ...], ...]


_UNRANKED = TypeAdapter(Unranked)


def write_unranked(to_rank: Path, unranked: Sequence[Unranked]) -> None:
    """Write the answers to `to_rank`, whole or not at all."""
    with replacing(to_rank) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in unranked:
            row = {
                "id": item.id,
                "prompt": item.prompt,
                "answers": item.answers,
                "prompt_ids": item.prompt_ids,
                "answer_ids": item.answer_ids,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_unranked(to_rank: Path) -> list[Unranked]:
    """Read the answers that `write_unranked` wrote. Rankings refer to them, so they must not be sampled again."""
    unranked = []
    for number, row in _json_lines(to_rank):
        try:
            found = _UNRANKED.validate_python(row)
            if len(found.answer_ids) != len(found.answers):
                raise ValueError("answers and answer_ids differ in length")
        except ValueError as error:
            raise UserError(
                f"{to_rank} line {number}: not as collect wrote it ({in_a_line(str(error))[:100]}); "
                "delete the file and run collect again"
            ) from None
        unranked.append(found)
    return unranked


def _json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file with their line numbers, counted from 1; blank lines are skipped."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    return list(json_lines(text, path))
