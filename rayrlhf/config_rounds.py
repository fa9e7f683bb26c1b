"""The section `rounds`, and the keys of other sections in which a round differs from an ordinary run.

`rayrlhf.runs.rounds` derives each round's config; docs/rounds.md compares the choices with published systems.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayrlhf.sections import Fraction, Positive, Section

Share = Annotated[float, Field(ge=0)]


class AnsweringConfig(Section):
    """Who answers the prompts of a round, as shares of the answers to each prompt. What is not there leaves its share
    to the newest policy: in the first round all answers are the SFT model's."""

    newest: Annotated[float, Field(gt=0)] = 1.0
    """The policy of the round before. Alone, the default: the reward model is to know the answers that the next policy
    is going to be near (Touvron et al. 2023, section 3.2)."""
    earlier: Share = 0.0
    """The policies of the rounds before that one, in equal parts."""
    sft: Share = 0.0
    """The SFT model. Most comparisons of Ouyang et al. 2022 (section 3.1) were of its answers."""


class RoundsConfig(Section):
    """Repeats `collect`, `reward_model` and `rl` (or `dpo`) with fresh answers of the newest policy."""

    count: Positive
    """So many rounds at most. A round is a whole run, in the folder RUN/round-N."""
    answers: AnsweringConfig = AnsweringConfig()
    age_weight: Fraction = 1.0
    """The weight of a comparison is multiplied by this for each round that it is old, in the loss of the reward model
    and of `dpo`. 1: all so far count alike (Bai et al. 2022, section 4.5; Dong et al. 2024). 0: only the newest ones
    are learnt from. Held-out comparisons of all rounds are measured whatever this is."""
    reward_model_from: Literal["sft", "previous"] = "sft"
    """What a reward model begins with. sft: as in the first round, so that no comparison counts twice (Ouyang et al.
    2022; Touvron et al. 2023). previous: the one of the round before, which saves steps where `age_weight` is low."""
    policy_from: Literal["previous", "sft"] = "previous"
    """What a policy begins with. previous: the one of the round before, so that the steps of rounds add up (Dong et al.
    2024). sft: each is made anew (Ouyang et al. 2022; Bai et al. 2022). Either way the reference policy is the SFT
    model of the first round, so that the KL penalty bounds the distance of all rounds together."""
    stop: bool = True
    """Do no further round when the policy no longer gets better: when in two rounds in a row the interval of its win
    rate over the round before includes 50 %, or when gold falls while the reward rises."""


class AnsweringModel(Section):
    """A model that answers prompts of the stage `collect`."""

    start: str = Field(alias="from")
    """As `from` of other sections: a model, or a run's folder for its policy."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Of each prompt's answers, relative to the shares of the other models."""


class EarlierComparisons(Section):
    """Comparisons of another run that are learnt from beside those of this one."""

    path: str
    """A comparisons.parquet, as `collect` writes it; also a URI."""
    weight: Fraction = 1.0
    """Of each of them in the loss, beside 1 for the run's own. 0: its held-out comparisons are measured, and none is
    learnt from."""


class CollectsAfterOthers(Section):
    """What `collect` has where other runs came before, as the rounds of one run do."""

    models: tuple[AnsweringModel, ...] = ()
    """Whose answers are ranked. Empty: those of the model of `sft`."""
    skip_prompts: Annotated[int, Field(ge=0)] = 0
    """So many of the prompts, in the order in which they are drawn, were had by earlier rounds: draw those after them,
    and these again only where no others are left."""
    earlier: tuple[EarlierComparisons, ...] = ()
    margin_from: str | None = None
    """The reward model by which `collect.labeller.choose: margin` asks, as `from` of other sections. null: that of
    `reward_model.from`; in rounds after the first, that of the round before."""

    @model_validator(mode="after")
    def _paths_are_named_once(self) -> CollectsAfterOthers:
        paths = [each.path for each in self.earlier]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise ValueError(f"earlier: {twice} is named twice: each comparison would count twice")
        return self


def chooses_by_margin(config: Any) -> bool:
    """Whether people are asked first where an earlier reward model is least sure; `config` as in `fault_of_rounds`."""
    by_margin = getattr(config.collect.labeller, "choose", None) == "margin"
    return by_margin and config.has("collect") and config.data.comparisons is None


def has_margins(config: Any) -> bool:
    """Whether there is such a reward model before the run, or the first of its rounds, has trained one."""
    return config.collect.margin_from is not None or config.reward_model.start is not None


def fault_of_margins(config: Any) -> str | None:
    """What is wrong with the reward model by which people are asked; None if nothing is."""
    if not chooses_by_margin(config):
        unread = "collect.margin_from: nothing reads it; set collect.labeller.choose=margin, or leave it out"
        return unread if config.collect.margin_from is not None else None
    if not any(reward.trained and reward.weight for reward in config.rewards):
        return "collect.labeller.choose: margin needs a reward of kind model without a path, with a weight"
    if has_margins(config) or (config.rounds is not None and config.trains_reward_model):
        return None
    return (
        "collect.labeller.choose: margin needs a reward model, which a run has in its second round; set rounds, "
        "reward_model.from or collect.margin_from, or choose: random"
    )


def fault_of_rounds(config: Any) -> str | None:
    """What keeps a config from being repeated in rounds; None if nothing does, or if it has no `rounds`.

    `config` is a `rayrlhf.config.Config`, whose file imports this one.
    """
    if config.rounds is None:
        return None
    rl, dpo, own = config.has("rl"), config.has("dpo"), config.trains_reward_model
    checks = (
        (config.data.comparisons is not None, "leave out data.comparisons: each round collects its own"),
        (not config.has("collect"), "need the stage collect"),
        (not (rl or dpo), "need the stage rl or dpo, whose policy answers in the next round"),
        (not (own or dpo), "need the stage reward_model with a reward of kind model without a path, or the stage dpo"),
        (
            config.evaluate.prompts is not None,
            "leave out evaluate.prompts; `rayrlhf evaluate RUN/round-N/config.yaml evaluate.prompts=FILE` asks others",
        ),
        (config.rounds.stop and not config.has("evaluate"), "need the stage evaluate to stop by; or set stop: false"),
    )
    if fault := next((f"rounds: {what}" for wrong, what in checks if wrong), None):
        return fault
    set_by_rounds = {
        "collect.models": config.collect.models,
        "collect.skip_prompts": config.collect.skip_prompts,
        "rl.skip_prompts": config.rl.skip_prompts,
        "evaluate.previous_from": config.evaluate.previous_from,
    }
    given = next((key for key, value in set_by_rounds.items() if value), None)
    return f"{given}: leave it out; rounds sets it for each round" if given else None
