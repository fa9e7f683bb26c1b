"""The sections of the config about data: its sources, its splits, and how long texts may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainSerializer, WrapValidator, model_validator

from rayrlhf.sections import Fraction, Positive, Section


class DatasetConfig(Section):
    """A source of records."""

    path: str
    """A file, a pattern of files such as `posts/*.csv`, a directory, any of these as a URI such as
    `s3://bucket/posts/`, a hub name, or `embedded:tldr`."""
    format: str | None = None
    """A key of `rayrlhf.data.formats.FORMATS`. null: it is recognised by the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our names of columns, and the file's: `{prompt: question, response: answer}`."""
    name: str | None = None
    """Of a hub data set with several configurations, the one that is meant."""
    revision: str | None = None
    """Of a hub name: a branch, tag or commit."""
    train_split: str = "train"
    valid_split: str = "validation"
    weight: Annotated[float, Field(gt=0)] | None = None
    """Among several sources: the share of the training records that are drawn from this one, relative to the other
    sources' weights. Give each source one, or none: without weights all records are used."""
    skip_bad_rows: bool = False
    """Skip and count the rows that cannot be read, in place of an error. So it is always with a hub name."""


def _one_or_several(given: Any, check: Callable[[Any], Any]) -> Any:
    """A source may stand alone, and be no more than its path."""
    if isinstance(given, str):
        given = {"path": given}
    if isinstance(given, dict | DatasetConfig):
        return (DatasetConfig.model_validate(given, strict=True),)  # by itself, so that an error names no list
    if isinstance(given, list | tuple):
        given = tuple({"path": each} if isinstance(each, str) else each for each in given)
    return check(given)


def _alone(sources: tuple[DatasetConfig, ...]) -> Any:
    return sources[0] if len(sources) == 1 else sources


Sources = Annotated[
    tuple[DatasetConfig, ...], Field(min_length=1), WrapValidator(_one_or_several), PlainSerializer(_alone)
]
"""One source, or a list of them."""


class DataConfig(Section):
    """The data, how it is split, and how long prompts and responses may be."""

    CHOSEN: ClassVar = ("max_prompt_tokens", "max_response_tokens")

    demonstrations: Sources = (DatasetConfig(format="tldr", path="embedded:tldr"),)
    comparisons: Sources | None = None
    """Comparisons by people, to train the reward model or for `dpo`; or, for KTO, labelled answers. null: the stage
    `collect` makes comparisons."""
    prompts: Sources | None = None
    """Prompts for `rl` and `evaluate`, which need no response. null: those of the demonstrations."""
    rl_prompts: Literal["rest", "sft", "all"] = "rest"
    """Which of the demonstrations' prompts `rl` has: those that neither SFT nor the reward model takes, those of SFT
    again, or all. With `prompts` it has those."""
    system_prompt: str | None = None
    """Put before every prompt that has no system turn of its own (docs/data.md)."""
    sft_fraction: Fraction = 0.4
    reward_model_fraction: Fraction = 0.3
    """Shares of the training records, by a hash of their id. The rest are the prompts of `rl`. Unless it is given, the
    reward model's share is 0 where there are `comparisons`."""
    dev_fraction: Fraction = 0.4
    """Share of the validation records that selects checkpoints (dev); the rest is the test split."""
    max_prompt_tokens: Positive = 160
    """A longer prompt is cut (`rayrlhf.data.template`). auto, or not given: it is chosen by the data when a run starts
    (`rayrlhf.data.lengths`)."""
    max_response_tokens: Positive = 48
    """A longer response in the data is cut and has no EOS; generators stop here. auto, or not given: as above."""
    min_response_tokens: Annotated[int, Field(ge=0)] = 0
    """Generators sample at least so many tokens before the one that ends a response, at every stage. With an
    `environment`: in each turn of the policy. Responses in the data may be shorter."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a sampled response beside the EOS, such as `<|eot_id|>`. Each is one of the tokenizer's
    tokens: where a text of several tokens ends a response, its last token would not be the policy's own choice."""

    @model_validator(mode="before")
    @classmethod
    def _need_no_prompts_for_the_reward_model(cls, tree: Any) -> Any:
        """The share would be set aside for nobody."""
        given = isinstance(tree, dict) and tree.get("comparisons") is not None
        return {"reward_model_fraction": 0.0, **tree} if given else tree

    @model_validator(mode="after")
    def _weigh_all_or_none(self) -> DataConfig:
        for key in ("demonstrations", "comparisons", "prompts"):
            sources = getattr(self, key) or ()
            if 0 < sum(source.weight is not None for source in sources) < len(sources):
                raise ValueError(f"{key}: some of the sources have a weight; give each one, or none")
        return self

    @model_validator(mode="after")
    def _responses_can_end(self) -> DataConfig:
        chosen = "max_response_tokens" in self.to_choose
        if self.min_response_tokens >= self.max_response_tokens and not chosen:
            raise ValueError(
                f"min_response_tokens ({self.min_response_tokens}) must be below max_response_tokens "
                f"({self.max_response_tokens}): no response could end"
            )
        return self

    @model_validator(mode="after")
    def _share_out_no_more_than_there_is(self) -> DataConfig:
        if self.sft_fraction + self.reward_model_fraction > 1.0 + 1e-9:  # rounding
            raise ValueError("sft_fraction + reward_model_fraction must not exceed 1")
        return self


def paths_of(sources: tuple[DatasetConfig, ...]) -> str:
    """The sources' paths, in words."""
    return ", ".join(source.path for source in sources)
