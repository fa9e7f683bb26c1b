"""The section `collect.labeller`: one class a labeller, chosen by `kind`. `rayrlhf.rewards.labellers` makes them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from rayrlhf.config_services import JudgeSection
from rayrlhf.sections import Section


class ReferenceLabellerConfig(Section):
    """Ranks by ROUGE-L with the author's own summary."""

    measures: ClassVar[bool] = True
    """Whether it measures a single answer, without asking anybody: the gold measure is its own then."""

    kind: Literal["reference"] = "reference"


class FileLabellerConfig(Section):
    """Reads people's rankings."""

    measures: ClassVar[bool] = False

    kind: Literal["file"] = "file"
    path: str
    """JSONL that holds, or will hold, `id` and `ranking` (indices of the answers, best first)."""


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
    | Annotated[JudgeLabellerConfig, Tag("judge")],
    Discriminator(_kind),
]
"""The reference where no kind is named."""
