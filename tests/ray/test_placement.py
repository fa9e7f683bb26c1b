"""Roles on a cluster of four nodes with labels: the plan, waiting for a node, and where Ray really puts the actors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.pools.remote import Remote
from actors.rollouts.coordinator import Coordinator
from actors.training.workers import Workers
from jobs.cluster import ask_nodes, cluster_machines, preflight
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from tests.clusters import cluster_of_nodes

TINY = resolve_model("embedded:opt-tiny")
LEARNER, GENERATOR = {"rayrlhf.io/role": "learner"}, {"rayrlhf.io/role": "generator"}

_NODES = ((LEARNER, 0), (LEARNER, 0), (GENERATOR, 1))


@pytest.fixture(scope="module")
def cluster(no_ray: None) -> Iterator[Cluster]:
    """A head without CPUs; learner nodes and one rollout node, which claims to have a GPU."""
    nodes = [{"num_cpus": 2, "num_gpus": gpus, "labels": labels} for labels, gpus in _NODES]
    with cluster_of_nodes(0, *nodes) as cluster:
        yield cluster


def config(tmp_path: Path, generators: int = 1, wait_s: int = 0) -> Config:
    return parse_config(
        {
            "name": "placed",
            "runs_dir": str(tmp_path),
            "data": {"max_prompt_tokens": 40, "max_response_tokens": 8},
            "resources": {
                "learner": {"workers": 2, "cpus": 1, "labels": LEARNER},
                "generators": {"count": generators, "cpus": 1, "labels": GENERATOR, "kv_cache_mib": 64},
                "scorers": {"cpus": 1, "labels": GENERATOR},
                "wait_for_nodes_s": wait_s,
            },
        },
        "test",
    )


def labels_of_node(node_id: str) -> dict[str, str]:
    return next(node["Labels"] for node in ray.nodes() if node["NodeID"] == node_id)


def where(arguments: dict[str, Any]) -> None:
    """A training loop that writes down the node it is on."""
    rank = ray.train.get_context().get_world_rank()
    (arguments["directory"] / f"rank{rank}").write_text(ray.get_runtime_context().get_node_id())


# Two engines, a scorer and a worker group: minutes. unit/test_placement holds the plan itself.
@pytest.mark.long
def test_actors_are_where_their_labels_say(cluster: Cluster, tmp_path: Path) -> None:
    own = config(tmp_path)
    table = preflight(own)
    assert table.row_count == 3
    reward_model = tmp_path / "reward_model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), reward_model)
    coordinator = Remote.spawn(
        "placed", Coordinator, own, TINY, 48, load_tokenizer(TINY).pad_token_id, False, local=False,
        options={"num_cpus": 0},
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(coordinator.kill)
        nodes = [place["node"] for place in coordinator.call("start_generators", timeout_s=600)]
        nodes += [place["node"] for place in coordinator.call("start_scorers", str(reward_model), TINY, timeout_s=600)]
        assert [labels_of_node(node)["rayrlhf.io/role"] for node in nodes] == ["generator", "generator"]

    workers = Workers(own.resources.learner, str(tmp_path / "train"), "where", local=False)
    workers.train(where, {"directory": tmp_path})
    workers.close()
    learners = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert learners[0] == learners[1], "two workers that fit one node are packed on it"
    assert labels_of_node(learners[0])["rayrlhf.io/role"] == "learner"


# A process on each of three nodes; unit/test_machine holds what is made of their answers.
@pytest.mark.long
def test_a_node_with_gpus_is_asked_for_their_memory(cluster: Cluster) -> None:
    machines = cluster_machines()
    assert sorted((machine.cores, machine.gpus) for machine in machines) == [(2, 0), (2, 0), (2, 1)]
    assert all(machine.gpu_memory > 0 for machine in machines)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert ask_nodes(this_node, nodes) == nodes


def this_node() -> str:
    return ray.get_runtime_context().get_node_id()


def test_what_fits_nowhere_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        preflight(config(tmp_path, generators=4))
    assert str(raised.value).startswith(
        "resources.generators: 2 of 4 (each 1 CPUs) fit nowhere; nodes with rayrlhf.io/role=generator: "
    )
    assert "placed before: learner 2 x 1 CPUs" in str(raised.value)
    assert "lower resources.generators.count" in str(raised.value)


def test_a_run_waits_for_nodes(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="fit nowhere"):
        preflight(config(tmp_path, generators=3, wait_s=2))
    assert time.monotonic() - started >= 2
    assert "waiting for nodes (0 of 2 s): 1 generators, 1 scorers fit nowhere" in capsys.readouterr().out

    found: list[int] = []
    waiting = threading.Thread(
        target=lambda: found.append(preflight(config(tmp_path, generators=3, wait_s=200)).row_count)
    )
    waiting.start()
    while "waiting for nodes (0 of 200 s)" not in capsys.readouterr().out:
        time.sleep(0.1)
    assert not found
    cluster.add_node(num_cpus=2, labels=GENERATOR)  # from the main thread only
    waiting.join(200)
    assert found == [3]
