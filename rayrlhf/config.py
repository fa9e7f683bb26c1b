"""The config of a run: one section a stage, with the defaults. `rayrlhf.config_file` reads it from YAML.

Units: lengths are tokens, times are seconds, sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rayrlhf.config_alarms import AlarmsConfig
from rayrlhf.config_data import DataConfig
from rayrlhf.config_dpo import DPOConfig, DPOSection
from rayrlhf.config_environment import EnvironmentConfig
from rayrlhf.config_labellers import MOST_ANSWERS, LabellerConfig, ReferenceLabellerConfig
from rayrlhf.config_resources import ResourcesConfig
from rayrlhf.config_rewards import EnvironmentReward, ModelReward, Reward, Rewards
from rayrlhf.config_rl import ROUGE_NAMES, PPOConfig, RLSection
from rayrlhf.config_rounds import CollectsAfterOthers, RoundsConfig, fault_of_margins, fault_of_rounds
from rayrlhf.config_stages import StageName, fault_of_stages
from rayrlhf.sections import DrawConfig, NotAll, OptimizerConfig, Positive, Section, StartSection

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
"""The keys of `rayrlhf.tracking.registry.TRACKERS`."""


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
    """A directory, a hub name, or `embedded:opt-tiny` or `embedded:opt-7m` (shipped with the package)."""
    revision: str | None = None
    """Of a hub name: a branch, tag or commit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the forward passes; master weights and optimiser state are always float32."""
    lora: LoRAConfig | None = None
    """Train adapters only, in every stage, and the head of a reward or value model. A stage's output is merged."""


class SFTConfig(StartSection):
    """Stage `sft`: supervised fine-tuning on demonstrations."""

    CHOSEN: ClassVar = ("micro_batch_tokens",)

    epochs: Positive = 1
    batch_size: Positive = 32
    """Demonstrations per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    """Upper bound of the tokens of one forward pass on one worker; padding counts, for models that cannot pack rows.
    A single row that is longer gets a pass of its own. auto, or not given: chosen by the memory that there is when a
    run starts (`rayrlhf.models.micro_batches`). It changes speed and memory, not the result."""
    loss_on: Literal["completion", "all"] = "completion"
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_fraction=0.05)
    evals_per_epoch: Positive = 1
    """Measure dev loss and ROUGE so often an epoch; the best checkpoint is kept."""
    eval_prompts: Annotated[int, Field(ge=1, le=64)] = 64
    """Dev prompts that are answered for ROUGE."""
    patience: Positive = 3
    """Stop after this many evaluations without a better mean ROUGE, or an equal one and a lower dev loss."""
    max_demonstrations: Positive | None = None
    """Use only so many of the SFT split."""


class CollectConfig(DrawConfig, CollectsAfterOthers):
    """Stage `collect`: answers of the SFT model, or of `models`, ranked by a labeller."""

    prompts: Positive = 256
    answers_per_prompt: Annotated[int, Field(ge=2)] = 4
    include_reference: bool = False
    """Add the author's own completion to each prompt's answers before they are ranked."""
    labeller: LabellerConfig = ReferenceLabellerConfig()
    heldout_fraction: NotAll = 0.15
    """Share of the prompts that only measures the reward model's accuracy."""

    @model_validator(mode="after")
    def _people_can_rank_all_answers(self) -> CollectConfig:
        count = self.answers_per_prompt + self.include_reference
        if self.labeller.kind == "people" and count > MOST_ANSWERS:
            raise ValueError(
                f"answers_per_prompt: people rank {MOST_ANSWERS} answers to a prompt at most, and there would be "
                f"{count}{' with the reference' if self.include_reference else ''}; lower it"
            )
        return self


class RewardModelConfig(StartSection):
    """Stage `reward_model`: learn to order ranked answers."""

    CHOSEN: ClassVar = ("micro_batch_tokens",)

    epochs: Positive = 1
    prompts_per_batch: Positive = 16
    """Prompts (with all their ranked answers) per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    """As `sft.micro_batch_tokens`."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_fraction=0.05)
    max_comparisons: Positive | None = None
    """Use only so many of the comparisons."""


class EvaluateConfig(DrawConfig):
    """Stage `evaluate`: the SFT model and the policy on held-out records. SFT's dev prompts are answered alike."""

    split: Literal["test", "dev"] = "test"
    """The share of the validation records: `dev` if the result chooses something, as in a sweep."""
    prompts: str | None = None
    """Another file of posts and references, in the demonstrations' format, in place of the split."""
    max_prompts: Positive | None = None
    previous_from: str | None = None
    """Also measure this policy, a model as in `from` of other sections, and how often the run's wins against it."""
    temperature: Annotated[float, Field(ge=0.01)] = 0.01
    """Near-greedy; vLLM raises lower temperatures to 0.01."""
    best_of: Annotated[int, Field(ge=2)] | None = None
    """Also measure the best of so many answers of the SFT model, sampled at `rl.temperature` and chosen by the rewards:
    what costs no training, and therefore the baseline of `rl`."""
    bootstrap_samples: Positive = 2000
    """Resamples of every bootstrap interval."""


class Config(Section):
    """All of a run's settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `runs_dir/name`."""
    runs_dir: str = "runs"
    """A directory that every node sees, or a URI such as `s3://bucket/runs` (docs/jobs.md)."""
    start: str | None = Field(default=None, alias="from")
    """`from`: the folder of another run, whose finished stages are taken over where their settings and data are equal
    (docs/starting_points.md)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] | None = None
    """What `rayrlhf run` does, such as [sft, collect, dpo, evaluate]. null: sft, collect, reward_model, rl, evaluate,
    without `collect` where there are `data.comparisons`. With `dpo` and `rl`, `rl` starts from the model of `dpo`.
    Where `sft` or `reward_model` is left out, the `from` of its section is the run's model of that name."""
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
    rounds: RoundsConfig | None = None
    """Repeat `collect`, `reward_model` and `rl` (or `dpo`) with fresh answers of the newest policy (docs/rounds.md).
    null: the run does them once."""
    tracking: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the metrics go beside metrics.jsonl: `tensorboard`, `wandb`, `mlflow` (docs/tracking.md)."""
    alarms: AlarmsConfig = AlarmsConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def trains_reward_model(self) -> bool:
        """Whether the run trains a reward model."""
        wanted = any(reward.trained for reward in self.rewards)
        return wanted and (self.stages is None or "reward_model" in self.stages)

    @property
    def has_reward_model(self) -> bool:
        """Whether the run trains a reward model, or is given one in its place."""
        given = any(reward.trained for reward in self.rewards) and self.reward_model.start is not None
        return given or self.trains_reward_model

    @property
    def scored_by(self) -> tuple[Reward, ...]:
        """The rewards that the run has: all but the one that it would train, where it trains none and has none."""
        return tuple(r for r in self.rewards if self.has_reward_model or not r.trained)

    def has(self, stage: StageName) -> bool:
        """Whether `stages` names it. Without `stages`, whether the usual pipeline may have it."""
        return stage != "dpo" if self.stages is None else stage in self.stages

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        if fault := fault_of_stages(self) or fault_of_rounds(self) or fault_of_margins(self):
            raise ValueError(fault)
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
    def _selects_what_is_measured(self) -> Config:
        compared, select = ("gold", *ROUGE_NAMES), self.rl.select
        if self.environment is not None and select in compared:
            raise ValueError(f"rl.select: {select} is not measured with an environment; take score")
        measures = ("score", *compared, *(reward.name for reward in self.scored_by))
        if select is not None and select not in measures:
            raise ValueError(f"rl.select: {select} is not measured; take one of {', '.join(measures)}")
        return self

    @model_validator(mode="after")
    def _some_length_is_free(self) -> Config:
        overlong, longest = self.rl.overlong_tokens, self.data.max_response_tokens
        chosen = "max_response_tokens" in self.data.to_choose
        if overlong is not None and overlong > longest and not chosen:
            raise ValueError(f"rl.overlong_tokens ({overlong}) must not exceed data.max_response_tokens ({longest})")
        return self

    @model_validator(mode="after")
    def _scaling_needs_overlap(self) -> Config:
        if self.resources.generators.scale and not self.rl.max_staleness:
            raise ValueError(
                "resources.generators.scale needs rl.max_staleness of 1 or more: in turn the learner always waits"
            )
        return self
