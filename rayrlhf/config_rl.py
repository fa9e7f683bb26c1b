"""The section `rl`: one class an algorithm, chosen by `rl.algorithm`. The equations are in `rayrlhf.algorithms`.

They are apart from the equations because the command reads a config without torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rayrlhf.sections import DrawConfig, Fraction, OptimizerConfig, Positive, ReferenceSection, Section

ClipRange = Annotated[float, Field(gt=0)]
ROUGE_NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Mean F1 with the references (`rayrlhf.rewards.rouge`)."""


class KLConfig(Section):
    """The penalty for the distance from the reference policy. That is the SFT model, unless `rl.from` or
    `rl.reference_from` says otherwise."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    """The estimate of a token's KL divergence (Schulman 2020), of d = log pi - log pi_ref at the sampled token.
    k1, d: subtracted from the reward (Ziegler et al. 2019). In the loss, with gradient: k2, d^2 / 2, or k3,
    exp(-d) - 1 + d."""
    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """beta, in reward per nat (k1), or in loss per nat."""
    adaptive: bool = False
    """Steer the coefficient towards `target`."""
    target: Annotated[float, Field(gt=0)] = 6.0
    """Target of the adaptive controller, nats per response."""
    horizon: Positive = 10_000
    """Horizon of the adaptive controller, in samples."""


class RLConfig(ReferenceSection):
    """What all algorithms have: the batches, the updates, the limits of staleness, the score of a response."""

    CHOSEN: ClassVar = ("micro_batch_tokens",)

    critic: ClassVar[bool] = False
    """Whether the algorithm has a value model."""

    algorithm: str
    steps: Positive = 20
    prompts_per_step: Positive = 64
    skip_prompts: Annotated[int, Field(ge=0)] = 0
    """Begin behind so many of the prompts in the order of the seed, which earlier rounds have had (`rounds`)."""
    samples_per_prompt: Positive = 1
    """Responses drawn for each prompt."""
    max_redraws: Annotated[int, Field(ge=0)] = 0
    """How often, within a step, another prompt may take the place of one whose responses all have the same score and
    therefore teach nothing (dynamic sampling of DAPO, Yu et al. 2025, section 3.2). 0: such prompts stay in the batch.
    """
    epochs: Positive = 4
    """Passes over each step's samples."""
    minibatches: Positive = 1
    """Optimiser steps a pass."""
    micro_batch_tokens: Positive = 4096
    """As `sft.micro_batch_tokens`."""
    temperature: Annotated[float, Field(ge=0.01)] = 0.7  # vLLM would raise a lower one to 0.01
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-6, betas=(0.9, 0.999), eps=1e-5)
    clip_range: ClipRange = 0.2
    """How far the ratio of new to old policy may fall below 1, and rise above it unless `clip_range_high` says more."""
    clip_range_high: ClipRange | None = None
    """How far the ratio may rise above 1 (clip-higher of DAPO, Yu et al. 2025, section 3.1); null: `clip_range`."""
    loss_mean: Literal["token", "response", "constant"] = "token"
    """Over what the policy's loss is averaged, on all workers together. token: over the tokens of the mini-batch, so
    long responses weigh more. response: over the responses of their means over tokens. constant: the sum over tokens
    divided by responses * data.max_response_tokens, which favours no length (Liu et al. 2025, Dr. GRPO)."""
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Scores are clipped to [-reward_clip, reward_clip] before the KL penalty is subtracted."""
    missing_eos_reward: float | None = -1.0
    """Score of a response without EOS, in place of the sum of all rewards, your own included; null keeps the sum."""
    overlong_tokens: Positive | None = None
    """The score falls linearly, by 1 in all, over the last so many tokens before data.max_response_tokens (soft
    over-long punishment of DAPO, Yu et al. 2025, equation 13). null: by nothing."""
    kl: KLConfig = KLConfig()
    max_approx_kl: Annotated[float, Field(gt=0)] | None = None
    """A step's epochs end when a mini-batch's approx_kl to the sampling policy (nats a token) is above this."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many versions the weights that sampled a token may be behind the weights that are trained on it.
    0: generators and learner take turns. 1: generators sample the next batch while the learner trains on this one.
    2 and more: a long response may also come with a later batch."""
    max_importance_weight: Annotated[float, Field(ge=1)] = 2.0
    """With `max_staleness` above 0, a token's policy loss is weighted by pi_old / pi_generator, at most by this."""
    checkpoint_every: Positive = 10
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 2
    """So many checkpoints stay, the newest ones: if one is damaged, the one before it is taken."""
    sample_every: Positive | None = 10
    """Every so many steps, and before the first and after the last, the policy answers the first dev prompts to look
    at, near-greedily as in `evaluate`. null: never."""
    sample_prompts: Positive = 4
    """So many of them."""
    eval_every: Positive | None = None
    """As often, score, gold, KL, length and diversity of answers to dev prompts are measured. null: never."""
    eval_prompts: Positive = 64
    """On at most so many of them."""
    select: str | None = None
    """The policy with the highest mean of this over these answers is kept and becomes the run's policy. It is `gold`,
    `score`, one of `ROUGE_NAMES`, or the name of one of the rewards, with its weight. null: the last one does."""
    patience: Positive | None = None
    """Stop after this many evaluations without a better one by `select`. null: make all steps."""

    @property
    def of_no_result(self) -> tuple[str, ...]:
        """The keys of the section that do not decide which policy comes out."""
        looks = ("checkpoint_every", "keep_checkpoints", "sample_every", "sample_prompts")
        return looks if self.select else (*looks, "eval_every", "eval_prompts", "select", "patience")

    @property
    def draw(self) -> DrawConfig:
        """How responses are drawn that are learnt from: from the whole softmax."""
        return DrawConfig(temperature=self.temperature)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults_of_kl(cls, tree: Any) -> Any:
        """A config that names only the coefficient keeps the algorithm's own estimator."""
        if isinstance(tree, dict) and isinstance(tree.get("kl"), dict):
            return {**tree, "kl": cls.model_fields["kl"].default.model_dump() | tree["kl"]}
        return tree

    @model_validator(mode="after")
    def _minibatches_fit(self) -> RLConfig:
        # More of them would leave a mini-batch without a sample.
        if self.minibatches > self.prompts_per_step * self.samples_per_prompt:
            raise ValueError("minibatches must not exceed prompts_per_step * samples_per_prompt")
        return self

    @model_validator(mode="after")
    def _choices_need_measures(self) -> RLConfig:
        if self.select and self.eval_every is None:
            raise ValueError(f"select: {self.select} needs eval_every, such as 10: it chooses by these evaluations")
        if self.patience and self.select is None:
            raise ValueError("patience needs select, such as gold or score: it waits for a better one")
        return self

    @model_validator(mode="after")
    def _redraws_need_a_group(self) -> RLConfig:
        if self.max_redraws and self.samples_per_prompt < 2:
            raise ValueError(
                "max_redraws needs samples_per_prompt of 2 or more: one score is always the same as itself"
            )
        return self


class CriticConfig(RLConfig):
    """What algorithms with a value model have."""

    critic: ClassVar[bool] = True

    value_from: str | None = None
    """What the value model starts as: `reward_model`, `policy` (with a new head), or a model as in `from`, a run's
    folder for its reward model. null: the run's reward model, or the policy where the run has none."""
    value_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the value model; the policy's when absent."""
    value_clip_range: ClipRange = 0.2
    value_coefficient: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the value loss."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the value model is updated."""


class PPOConfig(CriticConfig):
    """PPO (Schulman et al. 2017) with a value model."""

    algorithm: Literal["ppo"] = "ppo"
    gamma: Fraction = 1.0
    """Discount of later rewards."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_advantages: bool = True
    whiten_rewards: bool = False


class GRPOConfig(RLConfig):
    """GRPO (Shao et al. 2024): a response's advantage is its score against the other responses to its prompt."""

    algorithm: Literal["grpo"] = "grpo"
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    epochs: Positive = 1
    scale_by_std: bool = True
    """Divide by the standard deviation of the group's scores. false: Dr. GRPO (Liu et al. 2025)."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: one ratio a response, the geometric mean of those of its tokens (GSPO, Zheng et al. 2025). It needs
    a clip_range of about 3e-4."""
    clip: Literal["surrogate", "weight"] = "surrogate"
    """weight: the clipped ratio is a constant weight of log pi, so that every token keeps its gradient (CISPO, MiniMax
    2025, equation 4)."""
    loss_mean: Literal["token", "response", "constant"] = "response"
    kl: KLConfig = KLConfig(estimator="k3", coefficient=0.04)

    @model_validator(mode="after")
    def _one_ratio(self) -> GRPOConfig:
        if self.ratio == "sequence" and self.clip == "weight":
            raise ValueError("ratio: sequence (GSPO) and clip: weight (CISPO) are two algorithms; take one")
        return self


class RLOOConfig(RLConfig):
    """RLOO (Ahmadian et al. 2024): REINFORCE with the mean of the prompt's other responses as the baseline."""

    algorithm: Literal["rloo"] = "rloo"
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    epochs: Positive = 1
    loss_mean: Literal["token", "response", "constant"] = "response"


class ReinforcePPConfig(RLConfig):
    """REINFORCE++ (Hu 2025): PPO's clipped loss with returns in place of a value model's advantages."""

    algorithm: Literal["reinforce_pp"] = "reinforce_pp"
    epochs: Positive = 1
    baseline: bool = False
    """Subtract the mean score of the prompt's responses before the advantages are whitened."""
    kl: KLConfig = KLConfig(coefficient=0.01)

    @model_validator(mode="after")
    def _baseline_needs_a_group(self) -> ReinforcePPConfig:
        if self.baseline and self.samples_per_prompt < 2:
            raise ValueError("baseline needs samples_per_prompt of 2 or more: it is the mean of a prompt's responses")
        return self


class CustomConfig(RLConfig):
    """An algorithm of your own, without a critic, in a file of your own; docs/extending.md shows one."""

    algorithm: Literal["custom"] = "custom"
    path: Annotated[str, Field(pattern=r"^(.*\.py|[\w.]+):\w+$")]
    """FILE.py:CLASS or MODULE:CLASS, with the methods of `rayrlhf.algorithms.base.Algorithm`. It is called with this
    section as its only argument."""
    settings: dict[str, Any] = Field(default={})
    """For your class to read, as `config.settings`."""


class CustomCriticConfig(CustomConfig, CriticConfig):
    """An algorithm of your own with a value model: its advantages come with returns, which the value model learns."""

    algorithm: Literal["custom_with_critic"] = "custom_with_critic"  # type: ignore[assignment]


def _algorithm(section: Any) -> str:
    return str(section.get("algorithm", "ppo") if isinstance(section, dict) else getattr(section, "algorithm", ""))


RLSection = Annotated[
    Annotated[PPOConfig, Tag("ppo")]
    | Annotated[GRPOConfig, Tag("grpo")]
    | Annotated[RLOOConfig, Tag("rloo")]
    | Annotated[ReinforcePPConfig, Tag("reinforce_pp")]
    | Annotated[CustomConfig, Tag("custom")]
    | Annotated[CustomCriticConfig, Tag("custom_with_critic")],
    Discriminator(_algorithm),
]
"""PPO where no algorithm is named."""
