"""Which stages a run may have: each needs its input from an earlier stage, or from the `from` of a section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

StageName = Literal["sft", "collect", "reward_model", "dpo", "rl", "evaluate"]
"""The keys of `rayrlhf.runs.stages.STAGES`, in their order."""


class _Beginning(Protocol):
    """A stage's section: the model that its `from` names."""

    @property
    def start(self) -> str | None: ...


class _Reward(Protocol):
    @property
    def trained(self) -> bool: ...


class _Data(Protocol):
    @property
    def comparisons(self) -> object | None: ...


class _Collect(Protocol):
    @property
    def models(self) -> Sequence[object]: ...
    @property
    def earlier(self) -> Sequence[object]: ...
    @property
    def skip_prompts(self) -> int: ...


class _Evaluate(Protocol):
    @property
    def best_of(self) -> int | None: ...


class Staged(Protocol):
    """What is read here of a `rayrlhf.config.Config`, whose file imports this one."""

    @property
    def stages(self) -> Sequence[StageName] | None: ...
    @property
    def data(self) -> _Data: ...
    @property
    def sft(self) -> _Beginning: ...
    @property
    def collect(self) -> _Collect: ...
    @property
    def reward_model(self) -> _Beginning: ...
    @property
    def dpo(self) -> _Beginning: ...
    @property
    def rl(self) -> _Beginning: ...
    @property
    def rewards(self) -> Sequence[_Reward]: ...
    @property
    def evaluate(self) -> _Evaluate: ...
    @property
    def has_reward_model(self) -> bool: ...
    @property
    def scored_by(self) -> Sequence[_Reward]: ...
    def has(self, stage: StageName) -> bool: ...


def fault_of_stages(config: Staged) -> str | None:
    """What is wrong with the stages of a config and with the models that they start from; None if nothing is."""
    scored = any(reward.trained for reward in config.rewards)
    value_from = getattr(config.rl, "value_from", None)
    has_sft = config.has("sft") or config.sft.start is not None
    checks = (
        *(
            (
                config.has(stage) and getattr(config, stage).reference_from == "sft" and not has_sft,
                f"{stage}.reference_from: the run has no SFT model; set sft.from, or a model",
            )
            for stage in ("dpo", "rl")
        ),
        (
            bool(config.collect.models or config.collect.earlier or config.collect.skip_prompts)
            and not (config.has("collect") and config.data.comparisons is None),
            "collect.models, earlier and skip_prompts: the run does without the stage collect, so leave them out",
        ),
        (
            config.reward_model.start is not None and not scored,
            "reward_model.from: no reward has the kind model without a path, so nothing would read this model",
        ),
        (
            value_from == "reward_model" and config.has("rl") and not config.has_reward_model,
            "rl.value_from: the run has no reward model; set policy, or a model",
        ),
    )
    return next((what for wrong, what in checks if wrong), None) or _fault_of_choice(config)


def _fault_of_choice(config: Staged) -> str | None:
    chosen, order = config.stages, get_args(StageName)
    if chosen is None:
        return None
    if list(chosen) != sorted(set(chosen), key=order.index):
        return f"stages: name each once, in this order: {', '.join(order)}"
    collected = config.data.comparisons is None
    scored = any(reward.trained for reward in config.rewards)
    has_sft = "sft" in chosen or config.sft.start is not None
    checks = [
        ("collect" in chosen and not has_sft, "sft is missing; collect samples from its model, or from sft.from"),
        *(
            (
                stage in chosen and not has_sft and section.start is None,
                f"sft is missing; {stage} starts from its model, from sft.from, or from {stage}.from",
            )
            for stage, section in (("reward_model", config.reward_model), ("dpo", config.dpo))
        ),
        (
            "rl" in chosen and "dpo" not in chosen and not has_sft and config.rl.start is None,
            "sft is missing; rl starts from its model, from sft.from, or from rl.from",
        ),
        *(
            (collected and stage in chosen and "collect" not in chosen, f"{stage} needs collect, or data.comparisons")
            for stage in ("dpo", "reward_model")
        ),
        (not collected and "collect" in chosen, "leave out collect; data.comparisons are used in place of its own"),
        (
            scored and "rl" in chosen and not config.has_reward_model,
            "rl needs reward_model, reward_model.from, or rewards of which none has the kind model without a path",
        ),
        (
            not scored and "reward_model" in chosen,
            "leave out reward_model; no reward has the kind model without a path",
        ),
        (
            "evaluate" in chosen and config.evaluate.best_of is not None and not config.scored_by,
            "evaluate.best_of needs a reward to choose by; add reward_model, or rewards of another kind",
        ),
        (
            "evaluate" in chosen and not {"dpo", "rl"} & {*chosen},
            "evaluate needs dpo or rl, whose model it compares with that of sft",
        ),
    ]
    return next((f"stages: {what}" for wrong, what in checks if wrong), None)
