"""The model that each stage of a run starts from: an earlier stage's, or the one that a `from` of the config names.

rl.from: facebook/opt-125m       a model on the hub, or a directory
rl.from: runs/a                  what the stage `rl` of run a has made; runs/a/sft is what its stage `sft` has made
"""

from __future__ import annotations

from pathlib import Path

from rayrlhf.config import Config
from rayrlhf.config_rounds import chooses_by_margin
from rayrlhf.errors import UserError, naming
from rayrlhf.models.loading import resolve_model
from rayrlhf.runs.addresses import as_typed, is_uri
from rayrlhf.runs.folder import RunFolder, run_at
from rayrlhf.runs.rounds import newest_round
from rayrlhf.runs.stages import STAGES
from rayrlhf.runs.storage import locate

SFT = "sft"
"""The value of `reference_from` that names a model of the run itself."""
_WORDS = ("policy", "reward_model")
"""Values of `rl.value_from` that name a model of the run itself."""


def find_models(config: Config) -> dict[str, str]:
    """Where the models are that the config names to start from, by dotted key; without those of stages left out.

    Raises:
        UserError: there is no such model, or a run that has not finished the stage.
    """
    found = {}
    for stage in ("sft", "reward_model", "dpo", "rl"):
        given = getattr(config, stage).start
        # A stage that is left out hands its model on; `dpo` and `rl` are no stage's start.
        used = config.has_reward_model if stage == "reward_model" else stage == "sft" or config.has(stage)
        if given is not None and used:
            found[f"{stage}.from"] = find_model(given, stage, f"{stage}.from")
    value_from = getattr(config.rl, "value_from", None)
    if value_from not in (None, *_WORDS) and config.has("rl"):
        found["rl.value_from"] = find_model(value_from, "reward_model", "rl.value_from")
    if chooses_by_margin(config):
        asked_by = config.collect.margin_from or config.reward_model.start
        assert asked_by is not None, "`rayrlhf.config_rounds` has seen to it"
        found["collect.margin_from"] = find_model(asked_by, "reward_model", "collect.margin_from")
    last = "rl" if config.has("rl") else "dpo"
    policies = {
        f"{stage}.reference_from": getattr(config, stage).reference_from for stage in ("dpo", "rl") if config.has(stage)
    }
    if STAGES["collect"].part_of(config):
        policies |= {f"collect.models[{i}].from": each.start for i, each in enumerate(config.collect.models)}
    if config.has("evaluate"):
        policies["evaluate.previous_from"] = config.evaluate.previous_from
    for key, policy in policies.items():
        if policy is not None and not (policy == SFT and key.endswith(".reference_from")):
            section = key.partition(".")[0]
            found[key] = find_model(policy, section if section in ("dpo", "rl") else last, key)
    return found


def find_model(given: str, stage: str, key: str) -> str:
    """The place of the model that `given` names: an absolute directory, a URI, or a name on the hub.

    Args:
        given: the value of `key`. A run's folder stands for the model that its stage `stage` has made.
        stage: a stage that makes a model.
        key: for errors.

    Raises:
        UserError: there is no such model, or the run has not finished the stage.
    """
    run = _run_folder(given)
    if run is not None:
        if run.done(stage):
            return run.address_of(run.output(stage))
        trained = [each.name for each in STAGES.values() if each.trains and run.done(each.name)]
        made = [as_typed(run.address_of(run.output(name))) for name in trained]
        raise UserError(
            f"{key}: run {given} has no finished stage {stage!r}; "
            + (f"it has made: {', '.join(made)}" if made else "it has made no model yet")
        )
    if is_uri(given):
        store, path = locate(given)
        if not store.exists(path):
            raise UserError(f"{key}: {given}: no such model, or its upload is not complete")
        return given
    with naming(key):
        return resolve_model(given)


def _run_folder(given: str) -> RunFolder | None:
    """The run at an address; None if it is none, such as a name on the hub or a model's directory."""
    if not is_uri(given) and not Path(given).expanduser().is_dir():
        return None
    run = newest_round(run_at(given))
    return run if run.read(run.config) is not None else None


class Starts:
    """The models that the stages of one run start from."""

    def __init__(self, config: Config, run: RunFolder, given: dict[str, str]) -> None:
        """`given` is what `find_models` has found."""
        self.config, self.run, self.given = config, run, given

    def of(self, stage: str) -> str:
        """The model that `stage` starts from, or reads: a directory, URI or name on the hub."""
        if (given := self.given.get(f"{stage}.from")) is not None:
            return given
        for earlier in STAGES[stage].starts_from:
            if STAGES[earlier].part_of(self.config):
                return self.run.address_of(self.run.output(earlier))
            if (given := self.given.get(f"{earlier}.from")) is not None:
                return given
        assert stage == "sft", "`rayrlhf.config_stages` has seen to it"
        return resolve_model(self.config.model.path)

    @property
    def base(self) -> str:
        """The model whose tokenizer and architecture the run's policies have."""
        if STAGES["sft"].part_of(self.config):
            return self.of("sft")
        policies = self.sft or self.config.has("dpo") or self.config.has("rl")
        return self.baseline if policies else self.of("reward_model")

    @property
    def baseline(self) -> str:
        """The policy that others are compared with: of the stage `sft`, or the one given in its place, or, where there
        is neither, the one that the first stage with a policy starts from."""
        return self.sft or self.of("dpo" if self.config.has("dpo") else "rl")

    @property
    def sft(self) -> str | None:
        """The model of the stage `sft`, or the one given in its place; None where there is neither."""
        has = STAGES["sft"].part_of(self.config) or "sft.from" in self.given
        return self.of("collect") if has else None

    @property
    def answering(self) -> list[tuple[str, float]]:
        """The models that answer prompts of the stage `collect`, each with its share."""
        models = self.config.collect.models
        given = [(self.given[f"collect.models[{i}].from"], each.share) for i, each in enumerate(models)]
        return given or [(self.of("collect"), 1.0)]

    def reference(self, stage: str) -> str:
        """The reference policy of `dpo` or `rl`."""
        wanted = getattr(self.config, stage).reference_from
        if wanted == SFT and self.sft is not None:
            return self.sft
        return self.given.get(f"{stage}.reference_from") or self.of(stage)

    @property
    def final_policy(self) -> str:
        """The model that the run is for: that of `rl`, or of `dpo` in a run without `rl`."""
        return self.run.address_of(self.run.policy if self.config.has("rl") else self.run.dpo)

    @property
    def reward_model(self) -> str | None:
        """The run's reward model; None if it has none."""
        if self.config.trains_reward_model:
            return self.run.address_of(self.run.reward_model)
        return self.given["reward_model.from"] if self.config.has_reward_model else None

    @property
    def value_model(self) -> str | None:
        """What the value model of `rl` starts as; None for an algorithm without one."""
        if not self.config.rl.critic:
            return None
        wanted = getattr(self.config.rl, "value_from", None)
        if (given := self.given.get("rl.value_from")) is not None:
            return given
        return self.of("rl") if wanted == "policy" else self.reward_model or self.of("rl")
