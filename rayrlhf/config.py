"""What a run can be told: one section a stage, with the defaults. `rayrlhf.config_file` reads it from YAML.

Units: lengths are tokens, times are seconds, sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced from other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class LoRAConfig(Section):
    """Low-rank adapters (Hu et al. 2021) in place of training all weights. They want a higher learning rate."""

    rank: Positive = 16
    alpha: Positive = 32
    """Updates are scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Linear layers by the end of their names (such as q_proj); all but the output head when absent."""


class ModelConfig(Section):
    """The causal language model that every stage starts from."""

    path: str = "embedded:opt-tiny"
    """A directory, a hub name, or `embedded:opt-tiny` (shipped with the package)."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the forward passes; master weights and optimiser state are always float32."""
    lora: LoRAConfig | None = None
    """Train adapters only, in every stage, and a reward or value model's head. What a stage leaves is merged."""


class DatasetConfig(Section):
    """Where records come from. `format` names an adapter in `rayrlhf.data.sources`."""

    format: str
    path: str
    """A .jsonl(.gz), .json or .parquet file, a directory that `datasets` can load, a hub name, or `embedded:tldr`."""
    train_split: str = "train"
    valid_split: str = "validation"


class DataConfig(Section):
    demonstrations: DatasetConfig = DatasetConfig(format="tldr", path="embedded:tldr")
    comparisons: DatasetConfig | None = None
    """Human comparisons to train the reward model on; without it the `collect` stage makes them."""
    sft_fraction: Fraction = 0.4
    reward_model_fraction: Fraction = 0.3
    """Shares of the training records by a hash of their id; the rest are PPO prompts."""
    dev_fraction: Fraction = 0.4
    """Share of the validation records used for selection (dev); the rest is the test split."""
    max_prompt_tokens: Positive = 160
    max_response_tokens: Positive = 48

    @model_validator(mode="after")
    def _leave_prompts_for_ppo(self) -> DataConfig:
        if self.sft_fraction + self.reward_model_fraction >= 1.0:
            raise ValueError("sft_fraction + reward_model_fraction must stay below 1: the rest are the PPO prompts")
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 3e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_fraction: Fraction = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class SFTConfig(Section):
    epochs: Positive = 1
    batch_size: Positive = 32
    """Demonstrations per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    """Upper bound of the tokens of one forward pass on one worker; they are packed (where a model cannot, padded ones
    count, too). A single row that is longer gets a pass of its own."""
    loss_on: Literal["completion", "all"] = "completion"
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_fraction=0.05)
    evals_per_epoch: Positive = 1
    eval_prompts: Annotated[int, Field(ge=1, le=64)] = 64
    patience: Positive = 3
    """Stop after this many evaluations without a better mean ROUGE."""
    max_demonstrations: Positive | None = None


class LabellerConfig(Section):
    kind: str = "reference"
    """`reference` ranks by ROUGE-L with the author's own summary; `file` reads people's rankings."""
    path: str | None = None
    """For `file`: JSONL with `id` and `ranking` (indices of the answers, best first)."""


class CollectConfig(Section):
    prompts: Positive = 256
    answers_per_prompt: Annotated[int, Field(ge=2)] = 4
    temperature: Annotated[float, Field(ge=0.01)] = 0.7
    include_reference: bool = False
    """Add the author's own completion to each prompt's answers before they are ranked."""
    labeller: LabellerConfig = LabellerConfig()
    heldout_fraction: Fraction = 0.15


class RewardModelConfig(Section):
    epochs: Positive = 1
    prompts_per_batch: Positive = 16
    """Prompts (with all their ranked answers) per optimiser step, over all learner workers."""
    micro_batch_tokens: Positive = 4096
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_fraction=0.05)
    max_comparisons: Positive | None = None


class KLConfig(Section):
    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """beta of the per-token reward -beta * (logp - logp_ref), in reward per nat."""
    adaptive: bool = False
    target: Annotated[float, Field(gt=0)] = 6.0
    """Target of the adaptive controller, nats per response."""
    horizon: Positive = 10_000
    """Horizon of the adaptive controller, in samples."""


class PPOConfig(Section):
    steps: Positive = 20
    prompts_per_step: Positive = 64
    samples_per_prompt: Positive = 1
    epochs: Positive = 4
    minibatches: Positive = 1
    micro_batch_tokens: Positive = 4096
    temperature: Annotated[float, Field(ge=0.01)] = 0.7
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-6, betas=(0.9, 0.999), eps=1e-5)
    value_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the value model; the policy's when absent."""
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    value_clip_range: Annotated[float, Field(gt=0)] = 0.2
    value_coefficient: Annotated[float, Field(gt=0)] = 0.1
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Scores are clipped to [-reward_clip, reward_clip] before the KL penalty is added."""
    max_approx_kl: Annotated[float, Field(gt=0)] | None = None
    """A step's epochs end when a mini-batch's approx_kl to the sampling policy (nats a token) is above this."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many updates the policy that sampled a token may be behind the one that is trained on it. 0: generators wait
    for the learner, and it for them; 1: they sample and score the next batch while it trains on this one; above:
    long responses may come with a later batch."""
    max_importance_weight: Annotated[float, Field(ge=1)] = 2.0
    """Where tokens may be stale, their policy loss is weighted by pi_old / pi_generator, at most by this."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the value model is updated."""
    missing_eos_reward: float | None = -1.0
    """Score of a response without EOS in place of the reward model's; null keeps the model's score."""
    kl: KLConfig = KLConfig()
    checkpoint_every: Positive = 10
    keep_checkpoints: Positive = 2
    """The newest ones stay: where one is damaged, the one before it is taken."""

    @model_validator(mode="after")
    def _minibatches_fit(self) -> PPOConfig:
        if self.minibatches > self.prompts_per_step * self.samples_per_prompt:
            raise ValueError("minibatches must not exceed prompts_per_step * samples_per_prompt")
        return self


Limit = Annotated[float, Field(ge=0)] | None


class AlarmsConfig(Section):
    """Limits beyond which a PPO step prints a one-line warning; null turns a warning off. Training is not changed.

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


class EvaluateConfig(Section):
    split: Literal["test", "dev"] = "test"
    """Which share of the validation records: `dev` where something is chosen by the result, as a sweep does."""
    prompts: str | None = None
    """Another file of posts and references (same format as the demonstrations) in place of the split."""
    max_prompts: Positive | None = None
    temperature: Annotated[float, Field(ge=0.01)] = 0.01
    """Near-greedy; vLLM raises lower temperatures to 0.01."""
    bootstrap_samples: Positive = 2000


def _shareable(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("a share of one GPU, or a whole number of them")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_shareable)]


class ScaleConfig(Section):
    """The number of generators follows the learner, between `min` and `max` of them (with `ppo.max_staleness` >= 1)."""

    min: Positive = 1
    max: Positive
    target_learner_wait: Fraction = 0.1
    """Generators are added while the learner waits for a larger share of its step; removed while they idle."""

    @model_validator(mode="after")
    def _in_order(self) -> ScaleConfig:
        if self.max < self.min:
            raise ValueError("max must not be below min")
        return self


class GeneratorConfig(Section):
    """vLLM rollout generators."""

    count: Positive = 1
    """At the start."""
    scale: ScaleConfig | None = None
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Gpus = 0.0
    labels: dict[str, str] = {}
    """Only nodes with these Ray labels hold them, such as `rayrlhf.io/role: generator`."""
    threads: Positive = 1
    """OpenMP threads of one generator (CPU only)."""
    kv_cache_mib: Positive = 512
    """Size of the KV cache on a CPU, in MiB; on a GPU `gpu_memory_utilization` decides."""
    gpu_memory_utilization: Fraction = 0.4
    max_num_seqs: Positive = 128


class ScorerConfig(Section):
    """Actors that hold the reward model and the reference policy."""

    count: Positive = 1
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Gpus = 0.0
    labels: dict[str, str] = {}
    """Only nodes with these Ray labels hold them, such as `rayrlhf.io/role: generator`."""
    threads: Positive = 1
    micro_batch_tokens: Positive = 8192


class LearnerConfig(Section):
    """Ray Train workers of the SFT, reward-model and PPO stages."""

    workers: Positive = 1
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Gpus = 0.0
    labels: dict[str, str] = {}
    """Only nodes with these Ray labels hold them, such as `rayrlhf.io/role: learner`."""
    threads: Positive = 1
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more arithmetic."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often Ray Train restarts the worker group from the last checkpoint."""


class ResourcesConfig(Section):
    """What differs between a laptop and a cluster; nothing here changes the mathematics."""

    generators: GeneratorConfig = GeneratorConfig()
    scorers: ScorerConfig = ScorerConfig()
    learner: LearnerConfig = LearnerConfig()
    wait_for_nodes_s: Annotated[int, Field(ge=0)] = 0
    """How long to wait for nodes that the cluster lacks, before a run starts or when its last generator or scorer has
    died; an autoscaler is asked for them."""
    start_timeout_s: Positive = 300
    """How long an actor may take until it is ready."""
    call_timeout_s: Positive = 600
    """How long one call (a generation, a scoring pass, a weight load) may take."""
    dashboard: bool = True
    """Start Ray's dashboard with a local cluster."""

    @property
    def newcomer_timeout_s(self) -> int:
        """How long an actor may take that starts during a run, for which an autoscaler may first have to add a node."""
        return self.wait_for_nodes_s + self.start_timeout_s

    @property
    def coordinator_timeout_s(self) -> int:
        """How long a call to the coordinator may take, whose own calls may find all generators dead, and all scorers,
        and wait for newcomers: longer than those, so that the error names the actor that is late and not the
        coordinator that waits for it."""
        return 2 * self.newcomer_timeout_s + 3 * self.call_timeout_s


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `runs_dir/name`."""
    runs_dir: str = "runs"
    """A directory that every node sees, or a URI such as `s3://bucket/runs` (docs/jobs.md)."""
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    collect: CollectConfig = CollectConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _scaling_needs_overlap(self) -> Config:
        if self.resources.generators.scale and not self.ppo.max_staleness:
            raise ValueError(
                "resources.generators.scale needs ppo.max_staleness of 1 or more: in turn the learner always waits"
            )
        return self
