"""Generators and scorers that come and go while the real coordinator runs ahead: the samples stay the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.pools.remote import Remote
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.groups import Cursor
from actors.rollouts.weight_sync import publish_directory
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.trajectory import Sampling

# Two starts of generators, for what test_coordinator shows in turn, and e2e/test_interrupt of a run that is ahead.
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]
TINY = resolve_model("embedded:opt-tiny")


@pytest.fixture(scope="module")
def coordinator(ray_cluster: None, tmp_path_factory: Any) -> Iterator[Remote]:
    settings = {
        "name": "scaled",
        "seed": 5,
        "data": {"max_prompt_tokens": 60, "max_response_tokens": 24},
        "rl": {"prompts_per_step": 6, "samples_per_prompt": 2, "steps": 9, "max_staleness": 1},
        "resources": {
            # Two of each have to fit the two CPUs of the cluster.
            "generators": {"cpus": 0.5, "kv_cache_mib": 64, "max_num_seqs": 8},
            "scorers": {"cpus": 0.5},
            "start_timeout_s": 600,
            "call_timeout_s": 600,
        },
    }
    config, tokenizer = parse_config(settings, "test"), load_tokenizer(TINY)
    reward_model: Path = tmp_path_factory.mktemp("reward") / "model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), tokenizer, reward_model)
    arguments = (config, TINY, 84, tokenizer.pad_token_id, False)
    remote = Remote.spawn(config.name, Coordinator, *arguments, local=False, options={"num_cpus": 0})
    remote.call("start_generators", timeout_s=600)
    remote.call("start_scorers", str(reward_model), TINY, timeout_s=600)
    rng = np.random.default_rng(0)
    prompts = [EncodedPrompt(f"p{i}", tuple(int(x) for x in rng.integers(3, 8000, 20 + i))) for i in range(20)]
    remote.call("set_prompts", prompts, Sampling(0.7, 24, tokenizer.eos_token_id), timeout_s=600)
    yield remote
    remote.kill()


def publish(coordinator: Remote) -> int:
    version: int = coordinator.call("next_version", timeout_s=600)
    coordinator.call("load_weights", publish_directory(TINY, version, local=False), timeout_s=600)
    return version


def batch(coordinator: Remote, step: int) -> Batch:
    found: Batch = coordinator.call("next_batch", step, publish(coordinator), timeout_s=600)
    return found


def until(coordinator: Remote, step: int, generators: int) -> Batch:
    """The batch of `step`, asked for again until so many generators have made it."""
    deadline = time.monotonic() + 600
    while True:
        found = batch(coordinator, step)
        if found.metrics["rollout/generators"] == generators:
            return found
        assert time.monotonic() < deadline
        time.sleep(2)  # the learner trains
        coordinator.call("begin", Cursor(step), timeout_s=600)


def test_the_samples_do_not_depend_on_who_makes_them(coordinator: Remote) -> None:
    def samples(*batches: Batch) -> dict[tuple[str, int], list[int]]:
        return {(t.prompt_id, t.seed): t.response_ids.tolist() for b in batches for t in b.trajectories}

    alone = samples(*(batch(coordinator, step) for step in range(3)))
    assert len(alone) == 36
    coordinator.call("begin", Cursor(0), timeout_s=600)

    assert coordinator.call("scale", 2, 2, timeout_s=600) == {"generator": 2, "scorer": 2}
    first = until(coordinator, 0, generators=2)
    places = coordinator.call("start_generators", timeout_s=600)
    assert len({place["pid"] for place in places}) == 2
    second = batch(coordinator, 1)
    counted = [stats["tokens"] for stats in coordinator.call("stats", timeout_s=600)]
    assert min(counted) > 2, "the newcomer works"
    assert coordinator.call("scale", 1, 1, timeout_s=600) == {"generator": 1, "scorer": 1}
    third = batch(coordinator, 2)
    assert samples(first, second, third) == alone
    assert all(t.rewards for b in (first, second, third) for t in b.trajectories)
    assert len(coordinator.call("stats", timeout_s=600)) == 1


def test_impossible_sizes_are_refused(coordinator: Remote) -> None:
    with pytest.raises(UserError, match="scale: 0 generators; at least one is needed"):
        coordinator.call("scale", 0, timeout_s=600)
