"""The section `resources`: how many actors and workers a run has, and what each of them asks of a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from rayrlhf.machine import Machine, resources_for
from rayrlhf.sections import Fraction, Positive, Section


def _shareable(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("a share of one GPU, or a whole number of them")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_shareable)]


class ScaleConfig(Section):
    """Let the number of generators follow the learner, between `min` and `max`. Needs `rl.max_staleness` >= 1."""

    min: Positive = 1
    max: Positive
    target_learner_wait: Fraction = 0.1
    """Generators are added while the learner waits for a larger share of its step, and removed while they idle."""

    @model_validator(mode="after")
    def _in_order(self) -> ScaleConfig:
        if self.max < self.min:
            raise ValueError("max must not be below min")
        return self


class Placement(Section):
    """What one actor or worker asks of a node."""

    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Gpus = 0.0
    labels: dict[str, str] = Field(default={})
    """Only nodes with these Ray labels hold it, such as `rayrlhf.io/role: generator`."""


class GeneratorConfig(Placement):
    """vLLM rollout generators."""

    CHOSEN: ClassVar = ("kv_cache_mib",)

    count: Positive = 1
    """Generators at the start; `scale` and `rayrlhf scale` change the number."""
    scale: ScaleConfig | None = None
    threads: Positive = 1
    """OpenMP threads of one generator (CPU only)."""
    kv_cache_mib: Positive = 512
    """Size of the KV cache on a CPU, in MiB; on a GPU `gpu_memory_utilization` decides. auto, or not given: what
    `max_num_seqs` sequences need, at most a quarter of the machine's free memory for all of its generators."""
    gpu_memory_utilization: Fraction = 0.4
    max_num_seqs: Positive = 128
    """Responses that vLLM samples at once."""


class ScorerConfig(Placement):
    """Actors that hold the reward model and the reference policy."""

    CHOSEN: ClassVar = ("micro_batch_tokens",)

    count: Positive = 1
    threads: Positive = 1
    micro_batch_tokens: Positive = 8192
    """Upper bound of the tokens of one forward pass. auto, or not given: chosen as `sft.micro_batch_tokens` is."""


class LearnerConfig(Placement):
    """Ray Train workers of all training stages."""

    workers: Positive = 1
    threads: Positive = 1
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often Ray Train restarts the worker group from the last checkpoint."""


class ResourcesConfig(Section):
    """The only section that differs between a laptop and a cluster. Nothing here changes the mathematics."""

    ROLES: ClassVar[tuple[str, ...]] = ("generators", "scorers", "learner")

    auto: bool = True
    """Choose the counts, CPUs, GPUs and threads of `generators`, `scorers` and `learner` that are not given,
    by the nodes of the Ray cluster, or by this machine where there is none (`rayrlhf.machine`). false unless it is
    given where one of the three is given: all its other keys have their defaults then."""
    generators: GeneratorConfig = GeneratorConfig()
    scorers: ScorerConfig = ScorerConfig()
    learner: LearnerConfig = LearnerConfig()
    wait_for_nodes_s: Annotated[int, Field(ge=0)] = 0
    """How long to wait for nodes that the cluster lacks; an autoscaler is asked for them.
    A run waits before it starts, and when its last generator or scorer has died."""
    start_timeout_s: Positive = 300
    """How long an actor may take until it is ready, and how long a run waits at its start for what other jobs hold."""
    call_timeout_s: Positive = 600
    """How long one call (a generation, a scoring pass, a weight load) may take."""
    heartbeat_timeout_s: Positive = 60
    """A generator or scorer that is up and gives no sign of life for so long is killed and replaced, whatever it does:
    a stopped process, a machine that is gone. A long call is no silence.
    A learner rank is killed if it stands still besides, and `learner.max_failures` counts that as a death."""
    dashboard: bool = True
    """Start Ray's dashboard with a local cluster."""

    @model_validator(mode="before")
    @classmethod
    def _keep_what_names_a_role(cls, tree: Any) -> Any:
        return {"auto": False, **tree} if isinstance(tree, dict) and {*cls.ROLES} & {*tree} else tree

    def shared_among(self, machines: Sequence[Machine]) -> ResourcesConfig:
        """With `auto`, the section with what was not given chosen for these machines; without, the same."""
        if not self.auto:
            return self
        shares = resources_for(machines)
        return self.model_copy(update={role: getattr(self, role).completed(shares[role]) for role in self.ROLES})

    @property
    def asks_for_machines(self) -> bool:
        """Whether something is to be chosen by the machines that there are."""
        cache = not self.generators.gpus and self.generators.to_choose
        return self.auto or bool(cache or self.scorers.to_choose)

    @property
    def newcomer_timeout_s(self) -> int:
        """Seconds until an actor that starts during a run must be ready. An autoscaler may have to add a node first."""
        return self.wait_for_nodes_s + self.start_timeout_s

    @property
    def coordinator_timeout_s(self) -> int:
        """Seconds that a call to the coordinator may take.

        The coordinator's own calls may find all generators dead, and all scorers, and wait for newcomers. This limit
        is longer than theirs, so that the error names the late actor and not the coordinator that waits for it.
        """
        # Twice: generators and scorers may have to be waited for, one after the other. Three calls: load weights,
        # generate, score.
        return 2 * self.newcomer_timeout_s + 3 * self.call_timeout_s
