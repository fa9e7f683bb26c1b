"""evaluation.json and reward_model.json of a run's folder, read back in the shape that tables and curves need."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rayrlhf.reports.measures import SCORERS
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.reading import read_json, sound

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Shape(BaseModel):
    """What a file has at least; it may have more."""

    model_config = ConfigDict(extra="allow")


class _Interval(_Shape):
    mean: _Number
    low: _Number
    high: _Number
    n: _Number
    p: _Number = 0.0


_Measures = dict[str, _Interval | None]


class _Facts(_Shape):
    prompts: int


class _Evaluation(_Shape):
    __pydantic_extra__: dict[str, _Measures]
    sft: _Measures
    differences: dict[str, _Measures] = {}
    metadata: _Facts = _Facts(prompts=0)


_Scorer = Annotated[str, Field(pattern=f"^({'|'.join(SCORERS)})$")]


class _Accuracy(_Shape):
    pairs: int
    prompts: int
    accuracy: dict[_Scorer, _Interval]
    reward_model_minus: dict[_Scorer, _Interval]


POLICY = ("policy", "differences")
"""What evaluation.json has of a run with a policy."""


def read_evaluation(run: RunFolder, *parts: str) -> dict[str, Any] | None:
    """evaluation.json; None of a run that is not evaluated.

    Args:
        run: the run.
        parts: keys that it has to have beside `sft`, such as `POLICY`.

    Raises:
        UserError: it is damaged.
    """
    content, address = run.read(run.evaluation), run.address_of(run.evaluation)
    if content is None:
        return None
    with sound(address):
        found: dict[str, Any] = read_json(content, address, _Evaluation)
        if missing := [part for part in parts if part not in found]:
            raise LookupError(missing[0])
        return found


def read_accuracy(run: RunFolder) -> dict[str, Any] | None:
    """reward_model.json; None of a run without a reward model.

    Raises:
        UserError: it is damaged.
    """
    path = run.reward_accuracy
    content = run.read(path)
    return None if content is None else dict(read_json(content, run.address_of(path), _Accuracy))
