"""A rollout node goes in the middle of PPO, as a spot instance does: the run goes on, and its samples are the same."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.pools.remote import Remote, this_node, wait
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.groups import Cursor
from actors.rollouts.weight_sync import publish_directory
from jobs.cluster import LOCAL_ENVIRONMENT
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.trajectory import Sampling

pytestmark = pytest.mark.usefixtures("no_ray")
TINY = resolve_model("embedded:opt-tiny")
GENERATOR = {"rayrlhf.io/role": "generator"}
RESPONSE = 64
STEPS = 4
"""All there are: a batch may have groups of the step after it, but for the last one's."""
NEVER = 8191
"""An id that is practically never sampled: every response has its full length."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with room for the scorer, and two rollout nodes with room for a generator each."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds Unix sockets
    os.environ.update(LOCAL_ENVIRONMENT)
    head = {"num_cpus": 1, "temp_dir": directory, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, labels=GENERATOR)
    ray.init(cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


# Two engines each; ray/test_coordinator kills a generator in turn, and ray/test_asynchronous one ahead of the learner.
@pytest.mark.long
@pytest.mark.parametrize("staleness", [0, 1], ids=["in turn", "ahead"])
def test_a_lost_node_costs_its_unfinished_prompts_a_second_try(
    cluster: Cluster, tmp_path: Path, staleness: int
) -> None:
    settings = {
        "name": f"spot{staleness}",
        "seed": 5,
        "data": {"max_prompt_tokens": 60, "max_response_tokens": RESPONSE},
        "rl": {"prompts_per_step": 12, "samples_per_prompt": 2, "steps": STEPS, "max_staleness": staleness},
        "resources": {
            "generators": {"count": 2, "cpus": 1, "labels": GENERATOR, "kv_cache_mib": 64, "max_num_seqs": 2},
            "scorers": {"cpus": 1},
            "start_timeout_s": 600,
            "call_timeout_s": 600,
        },
    }
    config, tokenizer = parse_config(settings, "test"), load_tokenizer(TINY)
    save_model(load_reward_model(TINY, fresh_head_seed=0), tokenizer, tmp_path / "reward")
    arguments = (config, TINY, 60 + RESPONSE, tokenizer.pad_token_id, False)
    here = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(this_node(), soft=False)}
    coordinator = Remote.spawn(config.name, Coordinator, *arguments, local=False, options=here)
    places = coordinator.call("start_generators", timeout_s=600)
    lost_node, other = (place["node"] for place in places)
    assert lost_node != other
    coordinator.call("start_scorers", str(tmp_path / "reward"), TINY, timeout_s=600)
    rng = np.random.default_rng(0)
    prompts = [EncodedPrompt(f"p{i}", tuple(int(x) for x in rng.integers(3, 8000, 20 + i))) for i in range(40)]
    coordinator.call("set_prompts", prompts, Sampling(0.7, RESPONSE, NEVER), timeout_s=600)

    def publish() -> int:
        version: int = coordinator.call("next_version", timeout_s=600)
        coordinator.call("load_weights", publish_directory(TINY, version, local=False), timeout_s=100)
        return version

    def batch(step: int) -> Batch:
        found: Batch = coordinator.call("next_batch", step, publish(), timeout_s=400)
        return found

    def after(former: Batch, generators: int) -> Batch:
        """The next batch, asked for again until so many generators have made it: a death is found by calls."""
        deadline = time.monotonic() + 600
        while (found := batch(former.step + 1)).metrics["rollout/generators"] != generators:
            assert time.monotonic() < deadline, found.metrics
            time.sleep(2)
            coordinator.call("begin", former.cursor, timeout_s=600)
        return found

    def samples(*batches: Batch) -> dict[tuple[str, int], list[int]]:
        return {(t.prompt_id, t.seed): t.response_ids.tolist() for b in batches for t in b.trajectories}

    undisturbed = samples(*(batch(step) for step in range(STEPS)))
    assert len(undisturbed) == STEPS * 12 * 2
    coordinator.call("begin", Cursor(0), timeout_s=600)

    first = batch(0)
    call = coordinator.submit("next_batch", 1, publish())
    time.sleep(0.3)
    node = next(node for node in cluster.list_all_nodes() if node.node_id == lost_node)
    cluster.remove_node(node, allow_graceful=False)
    under_way = not ray.wait([call.ref], timeout=0)[0]
    # Ahead of the learner it has work in any case: the next batch's.
    assert under_way or staleness, "the node was to go while its generator worked"
    second = wait([call], 600)[0]
    # Nothing has room for a third generator: the run does not wait for it.
    third = after(second, generators=1)
    back = cluster.add_node(num_cpus=1, labels=GENERATOR)
    fourth = after(third, generators=2)
    # Ray may have sent one more newcomer to the lost node before it held the node dead.
    assert coordinator.call("status", timeout_s=600).replacements["generator"] in (1, 2)
    places = coordinator.call("start_generators", timeout_s=600)
    assert [place["node"] for place in places] == [other, back.node_id]
    assert samples(first, second, third, fourth) == undisturbed
    assert all(t.rewards for b in (first, second, third, fourth) for t in b.trajectories)
    coordinator.kill()
