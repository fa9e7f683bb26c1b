"""The config of a run: one section a stage, with the defaults. `rayrlhf.config_file` reads it from YAML.

Units: lengths are tokens, times are seconds, sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from rayrlhf.config_data import DataConfig
from rayrlhf.config_dpo import DPOConfig, DPOSection
from rayrlhf.config_environment import EnvironmentConfig
from rayrlhf.config_labellers import LabellerConfig, ReferenceLabellerConfig
from rayrlhf.config_resources import ResourcesConfig
from rayrlhf.config_rewards import EnvironmentReward, ModelReward, Reward, Rewards
from rayrlhf.config_rl import PPOConfig, RLSection
from rayrlhf.sections import DrawConfig, Fraction, OptimizerConfig, Positive, Section


class LoRAConfig(Section):
    """Low-rank adapters (Hu et al. 2021), trained in place of all weights. They need a higher learning rate."""

    rank: Positive = 16
    alpha: Positive = 32
    """Updates are scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Linear layers by the end of their names, such as q_proj; null: all but the output head."""


class ModelConfig(Section):
    """The causal language model from which every stage starts."""

    path: str = "embedded:opt-tiny"
    """A directory, a hub name, or `embedded:opt-tiny` (shipped with the package)."""
    revision: str | None = None
    """Of a hub name: a branch, tag or commit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the forward passes; master weights and optimiser state are always float32."""
    lora: LoRAConfig | None = None
    """Train adapters only, in every stage, and the head of a reward or value model. A stage's output is merged."""


class SFTConfig(Section):
    """Stage `sft`: supervised fine-tuning on demonstrations."""

    epochs: Positive = 1
    batch_size: Positive = 32
    """Demonstrations per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    """Upper bound of the tokens of one forward pass on one worker; padding counts, for models that cannot pack rows.
    A single row that is longer gets a pass of its own."""
    loss_on: Literal["completion", "all"] = "completion"
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_fraction=0.05)
    evals_per_epoch: Positive = 1
    """Measure dev loss and ROUGE so often an epoch; the best checkpoint is kept."""
    eval_prompts: Annotated[int, Field(ge=1, le=64)] = 64
    """Dev prompts that are answered for ROUGE."""
    patience: Positive = 3
    """Stop after this many evaluations without a better mean ROUGE."""
    max_demonstrations: Positive | None = None
    """Use only so many of the SFT split."""


class CollectConfig(DrawConfig):
    """Stage `collect`: answers of the SFT model, ranked by a labeller."""

    prompts: Positive = 256
    answers_per_prompt: Annotated[int, Field(ge=2)] = 4
    include_reference: bool = False
    """Add the author's own completion to each prompt's answers before they are ranked."""
    labeller: LabellerConfig = ReferenceLabellerConfig()
    heldout_fraction: Fraction = 0.15
    """Share of the prompts that only measures the reward model's accuracy."""


class RewardModelConfig(Section):
    """Stage `reward_model`: learn to order ranked answers."""

    epochs: Positive = 1
    prompts_per_batch: Positive = 16
    """Prompts (with all their ranked answers) per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_fraction=0.05)
    max_comparisons: Positive | None = None
    """Use only so many of the comparisons."""


Limit = Annotated[float, Field(ge=0)] | None


class AlarmsConfig(Section):
    """Limits of the warnings. A RL step beyond a limit prints one line; null turns a warning off. Training goes on.

    "Start" is the run's first step, whose batch was sampled by the SFT model.
    """

    max_logprob_gap: Limit = 0.1
    """Mean |generator - learner| log-prob gap, nats a token."""
    max_kl: Limit = 30.0
    """KL to the reference, nats a response."""
    max_negative_kl: Limit = 1.0
    """How far the KL estimate may fall below 0, nats a response."""
    max_first_ratio_off_one: Limit = 0.01
    """Mean |ratio - 1| in the first mini-batch."""
    max_score_drop: Limit = 1.0
    """How far the mean score may fall below the start's, in standard deviations of the start's scores."""
    max_reward_drop: Limit = 1.0
    """With several rewards: how far one of them may fall below the start's mean, in its standard deviations at the
    start, while the score as a whole rises."""
    min_score_spread: Limit = 0.1
    """Standard deviation of the scores as a share of the start's."""
    min_length: Limit = 0.5
    """Mean response length as a share of the start's."""
    min_eos_rate: Limit = 0.5
    """Share of responses that end with EOS."""
    min_entropy: Limit = 0.2
    """Entropy of the policy as a share of the start's."""
    max_clip_fraction: Limit = 0.5
    """Share of tokens whose ratio was clipped."""


class EvaluateConfig(DrawConfig):
    """Stage `evaluate`: the SFT model and the policy on held-out records. SFT's dev prompts are answered alike."""

    split: Literal["test", "dev"] = "test"
    """The share of the validation records: `dev` if the result chooses something, as in a sweep."""
    prompts: str | None = None
    """Another file of posts and references, in the demonstrations' format, in place of the split."""
    max_prompts: Positive | None = None
    temperature: Annotated[float, Field(ge=0.01)] = 0.01
    """Near-greedy; vLLM raises lower temperatures to 0.01."""
    best_of: Annotated[int, Field(ge=2)] | None = None
    """Also measure the best of so many answers of the SFT model, sampled at `rl.temperature` and chosen by the rewards:
    what costs no training, and therefore the baseline of `rl`."""
    bootstrap_samples: Positive = 2000
    """Resamples of every bootstrap interval."""


StageName = Literal["sft", "collect", "reward_model", "dpo", "rl", "evaluate"]
"""The keys of `rayrlhf.runs.stages.STAGES`, in their order."""


class Config(Section):
    """All of a run's settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `runs_dir/name`."""
    runs_dir: str = "runs"
    """A directory that every node sees, or a URI such as `s3://bucket/runs` (docs/jobs.md)."""
    seed: Annotated[int, Field(ge=0)] = 0
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] | None = None
    """What `rayrlhf run` does, such as [sft, collect, dpo, evaluate]. null: sft, collect, reward_model, rl, evaluate,
    without `collect` where there are `data.comparisons`. With `dpo` and `rl`, `rl` starts from the model of `dpo`."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    collect: CollectConfig = CollectConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rewards: Rewards = (ModelReward(),)
    """What `rl` maximises the weighted sum of. Without a reward of kind `model` that has no `path` no reward model is
    trained, and the stages `collect` and `reward_model` are left out."""
    dpo: DPOSection = DPOConfig()
    environment: EnvironmentConfig | None = None
    """What answers the policy, so that a response takes several turns; null: a response is one turn."""
    rl: RLSection = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def trains_reward_model(self) -> bool:
        """Whether the run trains a reward model."""
        wanted = any(reward.trained for reward in self.rewards)
        return wanted and (self.stages is None or "reward_model" in self.stages)

    @property
    def scored_by(self) -> tuple[Reward, ...]:
        """The rewards that the run has: all but the one that it would train, where it trains none."""
        return tuple(r for r in self.rewards if self.trains_reward_model or not r.trained)

    def has(self, stage: StageName) -> bool:
        """Whether `stages` names it. Without `stages`, whether the usual pipeline may have it."""
        return stage != "dpo" if self.stages is None else stage in self.stages

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        chosen, order = self.stages, get_args(StageName)
        if chosen is None:
            return self
        if list(chosen) != sorted(set(chosen), key=order.index):
            raise ValueError(f"stages: name each once, in this order: {', '.join(order)}")
        collected = self.data.comparisons is None
        scored = any(reward.trained for reward in self.rewards)
        for wrong, what in (
            ("sft" not in chosen, "sft is missing; all others start from its model"),
            (collected and "dpo" in chosen and "collect" not in chosen, "dpo needs collect, or data.comparisons"),
            (
                collected and "reward_model" in chosen and "collect" not in chosen,
                "reward_model needs collect, or data.comparisons",
            ),
            (not collected and "collect" in chosen, "leave out collect; data.comparisons are used in place of its own"),
            (
                scored and "rl" in chosen and "reward_model" not in chosen,
                "rl needs reward_model, or rewards of which none has the kind model without a path",
            ),
            (
                not scored and "reward_model" in chosen,
                "leave out reward_model; no reward has the kind model without a path",
            ),
            (
                "evaluate" in chosen and self.evaluate.best_of is not None and not self.scored_by,
                "evaluate.best_of needs a reward to choose by; add reward_model, or rewards of another kind",
            ),
            (
                "evaluate" in chosen and not {"dpo", "rl"} & {*chosen},
                "evaluate needs dpo or rl, whose model it compares with that of sft",
            ),
        ):
            if wrong:
                raise ValueError(f"stages: {what}")
        return self

    @model_validator(mode="after")
    def _prompts_are_left_for_rl(self) -> Config:
        data = self.data
        taken = data.sft_fraction + data.reward_model_fraction
        if self.has("rl") and data.prompts is None and data.rl_prompts == "rest" and taken >= 1.0:
            raise ValueError(
                "data: sft_fraction + reward_model_fraction must stay below 1: the rest are the prompts of rl; "
                "or set rl_prompts: sft, which takes those of SFT again"
            )
        return self

    @model_validator(mode="after")
    def _environment_is_there(self) -> Config:
        if self.environment is None and any(isinstance(reward, EnvironmentReward) for reward in self.rewards):
            raise ValueError("rewards: kind environment needs the section environment, which gives these rewards")
        return self

    @model_validator(mode="after")
    def _some_length_is_free(self) -> Config:
        overlong, longest = self.rl.overlong_tokens, self.data.max_response_tokens
        if overlong is not None and overlong > longest:
            raise ValueError(f"rl.overlong_tokens ({overlong}) must not exceed data.max_response_tokens ({longest})")
        return self

    @model_validator(mode="after")
    def _scaling_needs_overlap(self) -> Config:
        if self.resources.generators.scale and not self.rl.max_staleness:
            raise ValueError(
                "resources.generators.scale needs rl.max_staleness of 1 or more: in turn the learner always waits"
            )
        return self
