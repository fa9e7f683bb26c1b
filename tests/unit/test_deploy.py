"""Files that start clusters: Ray's own schema, versions, and that the config's roles fit the nodes they describe."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayrlhf.config_file import load_config
from rayrlhf.runs.placement import Node, Plan, make_plan, roles_of

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/tldr_opt_1b_cluster.yaml"
ROLE = "rayrlhf.io/role"


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_ray_up_takes_the_file(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_commands_are_bash(name: str) -> None:
    """YAML ends an unquoted line at a hash: half a command is left, which the schema takes."""
    cluster = read(name)
    commands = [command for key, value in cluster.items() if key.endswith("_commands") for command in value]
    assert len(commands) >= 7
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_ray_up_refuses_a_misspelt_key() -> None:
    """What the test above relies on."""
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(read("cluster.yaml") | {"max_wrokers": 3}))


def ray_up_nodes() -> list[Node]:
    """All that cluster.yaml may start."""
    cluster = read("cluster.yaml")
    types = cluster["available_node_types"]
    counts = {name: 1 if name == cluster["head_node_type"] else t["max_workers"] for name, t in types.items()}
    assert sum(counts.values()) <= cluster["max_workers"] + 1
    return [
        Node(f"{name}-{i}", t["resources"]["CPU"], t["resources"].get("GPU", 0), t["labels"])
        for name, t in types.items()
        for i in range(counts[name])
    ]


def kuberay_nodes(name: str) -> list[Node]:
    spec = next(d for d in yaml.safe_load_all((ROOT / name).read_text()) if d["kind"].startswith("Ray"))["spec"]
    spec = spec.get("rayClusterSpec", spec)
    nodes = [
        Node("head", float(spec["headGroupSpec"]["rayStartParams"]["num-cpus"]), 0, spec["headGroupSpec"]["labels"])
    ]
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"], "Ray counts the limits, Kubernetes schedules the requests"
        size = float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))
        nodes += [Node(f"{group['groupName']}-{i}", *size, group["labels"]) for i in range(group["maxReplicas"])]
    return nodes


@pytest.mark.parametrize("source", ["cluster.yaml", "deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayjob.yaml"])
def test_the_configs_roles_fit_the_nodes_of_their_label(source: str) -> None:
    nodes = ray_up_nodes() if source == "cluster.yaml" else kuberay_nodes(source)
    plan: Plan = make_plan(roles_of(load_config(CONFIG).resources), nodes)
    assert plan.complete
    kinds = {role: {name.split("-")[0] for name in placed} for role, placed in plan.placed.items()}
    assert kinds == {"learner": {"learner"}, "generators": {"generator"}, "scorers": {"generator"}}
    assert {node.name.split("-")[0]: node.labels[ROLE] for node in nodes} == {
        "head": "head", "learner": "learner", "generator": "generator"
    }  # fmt: skip
    used = {name for placed in plan.placed.values() for name in placed}
    assert used == {node.name for node in nodes if node.labels[ROLE] != "head"}, "a full cluster has nobody idle"


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_is_told_the_version_that_the_image_holds(name: str) -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned and f'rayVersion: "{pinned[1]}"' in (ROOT / "deploy/kuberay" / name).read_text()


def test_the_job_starts_the_cluster_that_may_stand() -> None:
    (cluster,) = (
        d
        for d in yaml.safe_load_all((ROOT / "deploy/kuberay/raycluster.yaml").read_text())
        if "rayVersion" in d["spec"]
    )
    assert read("deploy/kuberay/rayjob.yaml")["spec"]["rayClusterSpec"] == cluster["spec"]


def test_kuberay_labels_are_of_the_group() -> None:
    """The operator refuses a group whose rayStartParams have labels."""
    for name in ("raycluster.yaml", "rayjob.yaml"):
        assert not re.search(r"rayStartParams: *{.*labels", (ROOT / "deploy/kuberay" / name).read_text())


def test_what_the_image_copies_is_what_it_installs_from() -> None:
    """The build installs from the checkout: nothing that the package needs may stay behind."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "rayrlhf", "actors", "jobs", "configs"):
        assert (ROOT / needed).exists() and needed not in ignored


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "deploy/slurm/rayrlhf.sbatch")], check=True)
