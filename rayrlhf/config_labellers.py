"""The section `collect.labeller`: one class a labeller, chosen by `kind`. `rayrlhf.rewards.labellers` makes them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rayrlhf.config_services import JudgeSection
from rayrlhf.sections import Fraction, Positive, Section

MOST_ANSWERS = 9
"""Which people can rank of one prompt on the page: a rank is one digit."""


class ReferenceLabellerConfig(Section):
    """Ranks by the words that an answer shares with the author's own, see `rayrlhf.rewards.labellers`."""

    measures: ClassVar[bool] = True
    """Whether it measures a single answer, without asking anybody: the gold measure is its own then."""

    kind: Literal["reference"] = "reference"
    measure: Literal["content", "rouge_l"] = "content"
    """`content`: words weigh by how rare they are, and a third is for words that stand in the prompt
    (`rayrlhf.rewards.content`). `rouge_l`: ROUGE-L F1, most of which is function words."""


class FileLabellerConfig(Section):
    """Reads people's rankings."""

    measures: ClassVar[bool] = False

    kind: Literal["file"] = "file"
    path: str
    """JSONL that holds, or will hold, `id` and `ranking` (indices of the answers, best first)."""


class PeopleLabellerConfig(Section):
    """Waits for people, who rank on the page of `rayrlhf label RUN` (docs/labelling.md)."""

    measures: ClassVar[bool] = False

    kind: Literal["people"] = "people"
    labellers: Positive = 1
    """How many people judge each prompt's answers."""
    until: Annotated[Fraction, Field(gt=0)] = 1.0
    """The run goes on when this share of the prompts has been judged by so many."""
    wait_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds after which the stage ends, with an error that says how many prompts wait. null: it waits for ever."""
    aggregate: Literal["majority", "bradley_terry"] = "majority"
    """How several rankings become one: each pair by the majority, or all by scores in which reliable labellers weigh
    more (docs/agreement.md)."""
    choose: Literal["random", "disagreement", "margin"] = "random"
    """Which prompts are asked first: as drawn; those on which labellers disagree; or those between whose best two
    answers an earlier reward model decides by the least (`collect.margin_from`). With disagreement, a prompt on which
    the first two agree needs no third; `labellers` is the most that any has."""

    @model_validator(mode="after")
    def _third(self) -> PeopleLabellerConfig:
        if self.choose == "disagreement" and self.labellers < 3:
            raise ValueError("choose=disagreement asks a third labeller where two disagree: set labellers to 3 or more")
        return self


class PythonLabellerConfig(Section):
    """Ranks by a function of your own, which is as that of a reward; docs/extending.md shows one."""

    measures: ClassVar[bool] = True

    kind: Literal["python"] = "python"
    path: Annotated[str, Field(pattern=r"^(.*\.py|[\w.]+):\w+$")]
    """FILE.py:FUNCTION or MODULE:FUNCTION."""
    settings: dict[str, Any] = Field(default={})
    """Further keyword arguments of the function."""


class JudgeLabellerConfig(JudgeSection):
    """Asks a language model, see `rayrlhf.rewards.judge_labeller`."""

    measures: ClassVar[bool] = False  # it could, but each response of `rl` would be a question to pay for

    kind: Literal["judge"] = "judge"
    compare: Literal["pairs", "rate"] = "pairs"
    """Ask of each two answers which is better, in both orders: K (K - 1) questions. Or rate each: K questions."""


def _kind(section: Any) -> str:
    return str(section.get("kind", "reference") if isinstance(section, dict) else getattr(section, "kind", ""))


LabellerConfig = Annotated[
    Annotated[ReferenceLabellerConfig, Tag("reference")]
    | Annotated[FileLabellerConfig, Tag("file")]
    | Annotated[PythonLabellerConfig, Tag("python")]
    | Annotated[JudgeLabellerConfig, Tag("judge")]
    | Annotated[PeopleLabellerConfig, Tag("people")],
    Discriminator(_kind),
]
"""The reference where no kind is named."""
