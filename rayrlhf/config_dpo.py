"""The section `dpo`: one class a loss, chosen by `dpo.loss`. The equations are in `rayrlhf.algorithms.preferences`.

They are apart from the equations because the command reads a config without torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rayrlhf.sections import OptimizerConfig, Positive, ReferenceSection

PositiveFloat = Annotated[float, Field(gt=0)]
BALANCED = 4 / 3
"""How far good answers may outweigh bad ones, by number and weight (Ethayarajh et al. 2024, section 4.2)."""


class PreferenceConfig(ReferenceSection):
    """What all losses have: the batches and the updates."""

    CHOSEN: ClassVar = ("micro_batch_tokens",)

    reference: ClassVar[bool] = True
    """Whether the loss compares the policy with a reference policy."""
    takes_labels: ClassVar[bool] = False
    """Whether the loss also learns from single answers with a label, good or bad."""

    loss: str
    epochs: Positive = 1
    prompts_per_batch: Positive = 16
    """Prompts (with all their ranked answers) per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    """As `sft.micro_batch_tokens`."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, warmup_fraction=0.1)
    max_comparisons: Positive | None = None
    """Use only so many of the comparisons (prompts, with all their answers)."""

    @model_validator(mode="after")
    def _reference_is_used(self) -> PreferenceConfig:
        if self.reference_from is not None and not self.reference:
            raise ValueError(f"reference_from: loss {self.loss} has no reference policy; leave it out")
        return self

    def balance(self, good: int, bad: int) -> str | None:
        """A line for the user on so many good and bad answers to train on; None if there is nothing to say."""
        return None


class DPOConfig(PreferenceConfig):
    """DPO (Rafailov et al. 2023): the policy itself is the reward model, by beta log(pi / pi_ref)."""

    loss: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Reward per nat; a smaller one lets the policy go farther from the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs that are assumed to be labelled the wrong way round (cDPO, Mitchell 2023)."""


class IPOConfig(PreferenceConfig):
    """IPO (Azar et al. 2023): the margin is drawn to a finite target, so that it does not grow without end."""

    loss: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    """tau: the target of the margin, in nats per token, is 1 / (2 beta)."""


class SimPOConfig(PreferenceConfig):
    """SimPO (Meng et al. 2024): no reference policy, and a mean over tokens that favours no length."""

    reference: ClassVar[bool] = False

    loss: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Reward per nat per token."""
    target_margin: Annotated[float, Field(ge=0)] = 1.0
    """gamma: by how much the better answer's reward is to be above that of the worse one."""


class KTOConfig(PreferenceConfig):
    """KTO (Ethayarajh et al. 2024): each answer is good or bad by itself, measured against the batch's mean KL.

    The data may say so of single answers (format `unpaired`). Of ranked answers, the better one of a pair counts as
    good and the worse as bad.
    """

    takes_labels: ClassVar[bool] = True

    loss: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """Reward per nat."""
    desirable_weight: PositiveFloat = 1.0
    """lambda_D, of good answers."""
    undesirable_weight: PositiveFloat = 1.0
    """lambda_U, of bad answers."""

    def balance(self, good: int, bad: int) -> str | None:
        """Say so if one side outweighs the other (section 4.2), with the weight that would mend it.

        Of one side alone the loss is defined, too: then it only raises answers, or only lowers them.
        """
        if not good or not bad:
            here, there = ("good", "bad") if good else ("bad", "good")
            return f"dpo: all {good + bad} answers to train on are {here}; {there} ones, if you have any, teach more"
        desirable, undesirable = self.desirable_weight * good, self.undesirable_weight * bad
        if undesirable <= desirable <= BALANCED * undesirable:
            return None
        if desirable < undesirable:
            key, low, high = "desirable_weight", undesirable / good, BALANCED * undesirable / good
        else:
            key, low, high = "undesirable_weight", desirable / bad / BALANCED, desirable / bad
        return (
            f"dpo: {good} good answers of weight {self.desirable_weight:g} and {bad} bad ones of weight "
            f"{self.undesirable_weight:g} are {desirable / undesirable:.3g} to 1; the authors of KTO advise 1 to 4/3: "
            f"set dpo.{key} between {low:.3g} and {high:.3g}"
        )


def _loss(section: Any) -> str:
    return str(section.get("loss", "dpo") if isinstance(section, dict) else getattr(section, "loss", ""))


DPOSection = Annotated[
    Annotated[DPOConfig, Tag("dpo")]
    | Annotated[IPOConfig, Tag("ipo")]
    | Annotated[SimPOConfig, Tag("simpo")]
    | Annotated[KTOConfig, Tag("kto")],
    Discriminator(_loss),
]
"""DPO where no loss is named."""
