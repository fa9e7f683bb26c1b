"""What a run chooses by itself where its config says nothing: lengths by the data, the rest by the machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray

from jobs.cluster import cluster_machines
from rayrlhf.config import Config
from rayrlhf.config_resources import ResourcesConfig
from rayrlhf.config_stages import StageName
from rayrlhf.data.lengths import choose_lengths
from rayrlhf.machine import Machine, cache_for, room_of, this_machine
from rayrlhf.models.kv_cache import kv_cache_mib
from rayrlhf.models.loading import context_length, load_tokenizer
from rayrlhf.models.micro_batches import USEFUL, needs
from rayrlhf.runs.contents import Contents
from rayrlhf.runs.folder import RunFolder, changes_since, run_at, stored_config
from rayrlhf.runs.stages import stages_of

_TRAINING: tuple[StageName, ...] = ("sft", "reward_model", "dpo", "rl")
"""The stages of the learner: each has a section with `micro_batch_tokens`."""


def with_lengths(config: Config, run: RunFolder, model: str, contents: Contents) -> tuple[Config, str | None]:
    """Choose the lengths of `data` that are not given.

    They are those of the run's earlier calls, or of the run that it begins from, if data and model are still the same;
    so a finished stage keeps what it was done with.

    Args:
        config: of the run.
        run: its folder.
        model: with which it begins, a directory or a hub name.
        contents: of the files that the config names.

    Returns:
        The config, and a line about the lengths; None if the config gives both.

    Raises:
        UserError: the data, the tokenizer or the config of an earlier call cannot be read.
    """
    if not config.data.to_choose:
        return config, None
    for earlier in _earlier(run, config):
        stored = stored_config(earlier).data
        again = config.data.completed({key: getattr(stored, key) for key in config.data.to_choose})
        repeated = config.model_copy(update={"data": again})
        changes = changes_since(earlier, repeated, contents)
        if not any(change.key.split(".")[0] in ("data", "model") for change in changes):
            words = ", ".join(f"data.{key}={getattr(again, key)}" for key in config.data.to_choose)
            return repeated, f"as before: {words}"
    tokenizer = load_tokenizer(model, config.model.revision)
    return choose_lengths(config, tokenizer, context_length(model))


def with_resources(config: Config, model: str) -> tuple[Config, str | None]:
    """Choose the resources and micro-batches that are not given, by the cluster that this process is connected to, or
    by this machine.

    Args:
        config: of the run, with its lengths.
        model: with which it begins, a directory or a hub name.

    Returns:
        The config, and a line about what was chosen.
    """
    if not asks_for_machines(config):
        return config, None
    machines = cluster_machines() if ray.is_initialized() else [this_machine()]
    if not machines:
        return config, "resources: no node has a CPU yet, so that the defaults stay"
    resources, words = config.resources.shared_among(machines), []
    if resources.auto:
        words += [_words(resources, role) for role in resources.ROLES]
    generators = resources.generators
    if not generators.gpus and generators.to_choose:
        tokens = config.data.max_prompt_tokens + config.data.max_response_tokens
        own = config.model
        wanted = kv_cache_mib(model, own.revision, own.dtype, generators.max_num_seqs, tokens)
        chosen = {"kv_cache_mib": cache_for(machines, generators.count, wanted)}
        resources = resources.model_copy(update={"generators": generators.completed(chosen)})
        words.append(f"KV cache {resources.generators.kv_cache_mib} MiB")
    config, more = _with_micro_batches(config.model_copy(update={"resources": resources}), machines, model)
    words += more
    cores, gpus = sum(machine.cores for machine in machines), sum(machine.gpus for machine in machines)
    where = f"{len(machines)} machine{'s' if len(machines) > 1 else ''} with {cores} cores and {gpus} GPUs"
    return config, f"resources, by {where}: {'; '.join(words)}"


def asks_for_machines(config: Config) -> bool:
    """Whether something is to be chosen by the machines that there are."""
    return config.resources.asks_for_machines or bool(_open_stages(config))


def _open_stages(config: Config) -> list[str]:
    """The stages of the run whose micro-batch is not given."""
    names = {stage.name for stage in stages_of(config)}
    return [name for name in _TRAINING if name in names and getattr(config, name).to_choose]


def _with_micro_batches(config: Config, machines: Sequence[Machine], model: str) -> tuple[Config, list[str]]:
    """Choose the micro-batches that are not given; one number for all stages of the learner, which it does in turn."""
    resources = config.resources
    stages = _open_stages(config)
    scorers = ["scorers"] if resources.scorers.to_choose else []
    if not stages and not scorers:
        return config, []
    wanted = needs(config, model)

    def chosen(role: str, actors: int, names: Sequence[str]) -> dict[str, int]:
        """A value for a section of each name."""
        gpus = getattr(resources, role).gpus
        room, useful = room_of(role, machines, actors, gpus), USEFUL[role][gpus > 0]
        longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        tokens = wanted[role].fitting(room, useful, longest)
        why = "more is hardly faster" if tokens >= useful else f"by {room / 2**30:.1f} GiB of memory"
        words.append(f"micro_batch_tokens={tokens} of {', '.join(names)} ({why})")
        return {"micro_batch_tokens": tokens}

    words: list[str] = []
    if stages:
        values = chosen("learner", resources.learner.workers, stages)
        config = config.model_copy(update={stage: getattr(config, stage).completed(values) for stage in stages})
    if scorers:
        values = chosen("scorers", resources.scorers.count, scorers)
        resources = resources.model_copy(update={"scorers": resources.scorers.completed(values)})
    return config.model_copy(update={"resources": resources}), words


def _earlier(run: RunFolder, config: Config) -> Iterator[RunFolder]:
    """The folders of this run and of the one that it begins from, as far as they hold a run."""
    folders = [run, *([run_at(config.start)] if config.start is not None else [])]
    return (folder for folder in folders if folder.read(folder.config) is not None)


def _words(resources: ResourcesConfig, name: str) -> str:
    role = getattr(resources, name)
    count = resources.learner.workers if name == "learner" else role.count
    work = f"{role.gpus:g} GPUs" if role.gpus else f"{role.threads} threads"
    return f"{name} {count} × ({role.cpus:g} CPUs, {work})"
