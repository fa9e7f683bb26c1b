"""The gauges of real training loops, scraped from Ray's own metrics endpoint, and what is asked of monitoring/.

The loops run in a Ray process of ours: Ray Train's workers differ in nothing that matters here and take a minute to
start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import yaml
from ray._common.test_utils import fetch_prometheus_metrics

from actors.pools.monitoring import CONTROL, ExportingWriter, Gauges
from actors.pools.remote import Remote, namespace, wait
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.weight_sync import publish_directory
from actors.training.reward_model import RewardModelArguments, reward_model_loop
from actors.training.rl import RLArguments, rl_loop
from actors.training.sft import DevPrompt, SFTArguments, sft_loop
from jobs.cluster import loopback_only
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.config_labellers import ReferenceLabellerConfig
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.rows import Row
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import encode_prompts
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.rewards.labellers import ReferenceLabeller
from rayrlhf.runs.folder import open_or_create
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.trajectory import GenerationRequest, Sampling
from tests.sockets import beyond_loopback, listening

pytestmark = pytest.mark.usefixtures("cluster")

MONITORING = Path(__file__).parents[2] / "monitoring"
TINY = resolve_model("embedded:opt-tiny")
RESPONSE = 16
STARTED = time.time()
Labels = Mapping[str, str]


class Loops:
    """A process for training loops."""

    def run(self, loop: Any, arguments: Any) -> None:
        loop(arguments)

    def say_hello(self, name: str) -> None:
        Gauges("hello").set("hello", 1, actor=name)

    def set_and_forget(self) -> None:
        gauges = Gauges("forgetful")
        gauges.set("weight_version", 3, actor="generator-0")
        gauges.set("weight_version", float("nan"), actor="generator-0")
        gauges.set("weight_version", 4, actor="generator-1")
        with tempfile.TemporaryDirectory() as directory:
            writer = ExportingWriter(directory, "forgetful")
            writer.write("rl", 0, {"idle/generator-0": 0.5, "idle/scorer-0": 0.75})
            writer.write("rl", 1, {"idle/generator-1": 0.25, "idle/scorer-0": 0.5})
            writer.close()


@pytest.fixture(scope="module")
def cluster(no_ray: None) -> Iterator[str]:
    """As the other tests have it, with a dashboard, whose address it is, and collecting metrics every two seconds."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with loopback_only():
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            _temp_dir=directory,
            log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 2000},
        )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    settings = {
        "name": "watched",
        "runs_dir": str(tmp_path_factory.mktemp("runs")),
        "data": {"max_prompt_tokens": 96, "max_response_tokens": RESPONSE},
        "sft": {"batch_size": 2},
        "reward_model": {"prompts_per_batch": 2},
        "rl": {"steps": 2, "prompts_per_step": 3, "samples_per_prompt": 2, "epochs": 1, "max_staleness": 1},
        "resources": {"generators": {"kv_cache_mib": 64, "max_num_seqs": 32}, "call_timeout_s": 600},
    }
    return parse_config(settings, "test")


@pytest.fixture(scope="module")
def coordinator(cluster: str, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    tokenizer = load_tokenizer(TINY)
    reward_model = tmp_path_factory.mktemp("reward") / "model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), tokenizer, reward_model)
    records = read_demonstrations(config.data.demonstrations, "train", tokenizer, 96)[:20]
    ids = encode_prompts(tokenizer, [record.prompt for record in records])

    def spawn(attempt: int) -> Remote:
        return Remote.spawn(
            "coordinator",
            Coordinator,
            config,
            TINY,
            96 + RESPONSE,
            tokenizer.pad_token_id,
            False,
            local=False,
            options={"num_cpus": 0, "namespace": namespace(config)},
            concurrency_groups={CONTROL: 1},
        )

    def name_is_free() -> bool:
        try:
            ray.get_actor("coordinator", namespace(config))
        except ValueError:
            return True
        return False

    remote = exporting(spawn, "ray_rayrlhf_weight_version", lambda labels: labels["run"] == config.name, name_is_free)
    gold = GoldMeasure(ReferenceLabeller(ReferenceLabellerConfig(measure="rouge_l")), records, tokenizer)
    remote.call("start_scorers", str(reward_model), TINY, gold, timeout_s=600)
    remote.call("start_generators", timeout_s=600)
    prompts = [EncodedPrompt(record.id, tuple(own)) for record, own in zip(records, ids, strict=True)]
    remote.call("set_prompts", prompts, Sampling(0.7, RESPONSE, tokenizer.eos_token_id), timeout_s=600)
    arguments = RLArguments(config, str(Path(config.runs_dir) / config.name), "rl", 1, TINY, str(reward_model), remote)
    loops = exporting_loops("loops")
    loops.call("run", rl_loop, arguments, timeout_s=600)
    loops.call("set_and_forget", timeout_s=600)
    # The last weights of an asynchronous PPO need not reach a generator: nothing is sampled from them.
    version = remote.call("next_version", timeout_s=600)
    remote.call("load_weights", publish_directory(TINY, version, local=False), timeout_s=600)
    yield remote
    remote.kill()
    loops.kill()


@pytest.fixture(scope="module")
def other_loops(cluster: None, config: Config) -> Iterator[Remote]:
    """SFT and reward model, each for a few steps."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(700, 8000, count))

    run_dir = str(Path(config.runs_dir) / config.name)
    rows = [Row.completion(tokens(10), tokens(5)) for _ in range(6)]
    dev = [DevPrompt("p", tokens(10), tokens(5), "a reference")]
    ranked = [
        RankedAnswers(f"r{i}", "", tokens(8), ("a", "b"), (tokens(4), tokens(5)), None, "toy", heldout=i > 3)
        for i in range(6)
    ]
    loops = exporting_loops("other-loops")
    loops.call("run", sft_loop, SFTArguments(config, run_dir, "sft", 1, TINY, rows, dev, None), timeout_s=600)
    ranking = RewardModelArguments(config, run_dir, "reward_model", 1, TINY, ranked, rows, sft=TINY)
    loops.call("run", reward_model_loop, ranking, timeout_s=600)
    yield loops
    loops.kill()


def exporting(
    spawn: Callable[[int], Remote], series: str, is_of: Callable[[Labels], bool], may_spawn: Callable[[], bool]
) -> Remote:
    """A process whose gauges are known to arrive at the node's endpoint.

    Ray tries only for some seconds to connect a new process with the node's agent. Where the agent is too busy to
    answer, it logs "Metrics will not be exported", and nothing of that process ever arrives: another one is made.

    Args:
        spawn: makes the process of an attempt, which exports a gauge at once.
        series: the gauge.
        is_of: whether labels of `series` are those of the process.
        may_spawn: whether a killed process is gone as far as it matters to the next.
    """
    for attempt in range(20):
        while not may_spawn():
            time.sleep(0.1)
        remote = spawn(attempt)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if any(is_of(labels) for labels, _ in scrape().get(series, [])):
                return remote
            time.sleep(0.2)
        remote.kill()
    raise AssertionError(f"Ray exports {series} of none of 20 processes")


def exporting_loops(name: str) -> Remote:
    """A process for training loops whose gauges are known to arrive."""

    def spawn(attempt: int) -> Remote:
        loops = Remote.spawn(f"{name}-{attempt}", Loops, local=False, options={"num_cpus": 0})
        loops.call("say_hello", name, timeout_s=600)
        return loops

    return exporting(spawn, "ray_rayrlhf_hello", lambda labels: labels["actor"] == name, lambda: True)


def scrape() -> dict[str, list[tuple[Labels, float]]]:
    """What the node's metrics endpoint says: by name, labels and value of each series."""
    (node,) = ray.nodes()
    found = fetch_prometheus_metrics([f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"])
    return {name: [(sample.labels, sample.value) for sample in samples] for name, samples in found.items()}


@pytest.fixture(scope="module")
def scraped(coordinator: Remote, other_loops: Remote, config: Config) -> dict[str, list[tuple[Labels, float]]]:
    """A scrape with the end of all three stages and a status of the coordinator since then."""
    run_dir = Path(config.runs_dir) / config.name
    last = {stage: read_metrics(run_dir, stage)[-1]["step"] for stage in ("sft", "reward_model", "rl")}
    deadline = time.monotonic() + 600
    while late := missing(found := scrape(), last):
        assert time.monotonic() < deadline, (late, sorted(name for name in found if "rayrlhf" in name))
        time.sleep(0.2)
    return found


def missing(found: Mapping[str, list[tuple[Labels, float]]], last: Mapping[str, int]) -> list[str]:
    """What a scrape lacks of what was written last: by each stage, by the coordinator and by `Loops.set_and_forget`.

    Each is looked at by the value that it writes last or that differs from those before.
    """

    def value_of(name: str, **labels: str) -> float:
        own = [v for labelled, v in found.get(f"ray_rayrlhf_{name}", []) if labels.items() <= labelled.items()]
        return own[0] if own else -1.0

    groups = [v for labels, v in found.get("ray_rayrlhf_groups", []) if labels["run"] == "watched"]
    there = {f"step of {stage}": value_of("step", run="watched", stage=stage) == step for stage, step in last.items()}
    there |= {
        "reward bias": "ray_rayrlhf_reward_model_reward_bias" in found,
        "weight version": value_of("weight_version", run="watched", actor="generator-0") == 3,
        "groups": bool(groups) and not any(groups),
        "idle of the forgetful": value_of("idle", run="forgetful", actor="generator-1") == 0.25,
    }
    return [name for name, is_there in there.items() if not is_there]


def value(scraped: Mapping[str, list[tuple[Labels, float]]], name: str, **labels: str) -> float:
    """Of the one series with these labels."""
    (own,) = [v for found, v in scraped[f"ray_rayrlhf_{name}"] if labels.items() <= found.items()]
    return own


def test_gauges_are_what_the_loop_wrote_last(scraped: Mapping[str, list[tuple[Labels, float]]], config: Config) -> None:
    run_dir = Path(config.runs_dir) / config.name
    last = read_metrics(run_dir, "rl")[-1]
    assert last["step"] == 2
    for name in ("rl/kl", "rl/reward/mean", "rl/gold/mean", "time/sync", "throughput/tokens_per_s"):
        ours = value(scraped, name.replace("/", "_"), run="watched", stage="rl")
        assert ours == pytest.approx(last[name], rel=1e-6), name
    for actor in ("learner", "generator-0", "scorer-0"):
        assert value(scraped, "idle", run="watched", stage="rl", actor=actor) == pytest.approx(last[f"idle/{actor}"])
    assert value(scraped, "step", run="watched", stage="sft") == 3 == read_metrics(run_dir, "sft")[-1]["step"]
    assert value(scraped, "reward_model_reward_bias", run="watched") == pytest.approx(
        read_metrics(run_dir, "reward_model")[-1]["reward_model/reward_bias"]
    )
    assert STARTED < value(scraped, "step_time_seconds", run="watched", stage="rl") < time.time()


def test_gauges_of_the_coordinator(scraped: Mapping[str, list[tuple[Labels, float]]]) -> None:
    """Two steps were trained, each with weights of its own; then the rollouts ended, and others were loaded."""
    for actor in ("learner", "generator-0"):
        assert value(scraped, "weight_version", run="watched", actor=actor) == 3
    for state in ("waiting", "generating", "scoring", "scored"):
        assert value(scraped, "groups", run="watched", state=state) == 0
    for role in ("generator", "scorer"):
        assert value(scraped, "actors", run="watched", role=role) == 1
        assert value(scraped, "actors_wanted", run="watched", role=role) == 1
        assert value(scraped, "replacements", run="watched", role=role) == 0


def test_not_a_number_ends_a_series(scraped: Mapping[str, list[tuple[Labels, float]]]) -> None:
    """Of an actor that is gone, in a process that is not."""

    def series(name: str) -> dict[str, float]:
        found = {labels["actor"]: v for labels, v in scraped[name] if labels["run"] == "forgetful"}
        return {actor: v for actor, v in found.items() if not np.isnan(v)}

    assert series("ray_rayrlhf_weight_version") == {"generator-1": 4}
    assert series("ray_rayrlhf_idle") == {"generator-1": 0.25, "scorer-0": 0.5}


def test_every_expression_of_the_dashboard_finds_its_series(
    scraped: Mapping[str, list[tuple[Labels, float]]],
) -> None:
    dashboard = json.loads((MONITORING / "grafana/dashboards/rayrlhf.json").read_text(encoding="utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 30
    for target in targets:
        selectors = re.findall(r"(ray_\w+)(\{[^}]*\})?", target["expr"])
        assert selectors, target["expr"]
        for name, labels in selectors:
            series = [found for found, _ in scraped.get(name, []) if found.get("run") == "watched"]
            assert series, f"{target['expr']}: nothing in the scrape"
            used = {*re.findall(r"(\w+)=", labels), *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
            assert all(used <= found.keys() for found in series), f"{target['expr']}: {used}, there is {series[0]}"
    (variable,) = [v for v in dashboard["templating"]["list"] if v["name"] == "run"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    # Loops that earlier tests ran in this process export for as long as it lives.
    assert {found[label] for found, _ in scraped[name]} >= {"watched", "forgetful"}


def test_every_metric_of_the_page_is_there(scraped: Mapping[str, list[tuple[Labels, float]]]) -> None:
    page = (MONITORING.parent / "docs/monitoring.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(ray_rayrlhf_\w+)[`{]", page))
    assert len(named) > 15
    assert named <= scraped.keys()


def test_nothing_of_a_private_cluster_listens_beyond_this_machine(coordinator: Remote) -> None:
    """With its dashboard, the agents that collect metrics, and the actors of a run."""
    found = listening()
    assert found and not beyond_loopback(found)


def test_a_page_of_another_site_starts_nothing_through_the_dashboard(cluster: str) -> None:
    """Its name may lead here (DNS rebinding), and a browser then takes the dashboard for that site's own server."""
    job = {"entrypoint": "true"}
    signs: tuple[dict[str, str], ...] = (
        {"User-Agent": "Mozilla/5.0"},
        {"Origin": "http://elsewhere.invalid"},
        {"Sec-Fetch-Site": "same-origin"},
    )
    for sign in signs:
        headers = {"Host": "elsewhere.invalid", **sign}
        assert httpx.post(f"{cluster}/api/jobs/", json=job, headers=headers, trust_env=False).status_code == 405
    jobs = httpx.get(f"{cluster}/api/jobs/", trust_env=False).json()
    assert [each["type"] for each in jobs] == ["DRIVER"], "this process alone"


def test_status_of_a_run_from_the_command_line(coordinator: Remote, config: Config) -> None:
    """While the coordinator is busy: it waits for a generator that stands still."""
    run = open_or_create(config, Path(config.runs_dir))
    (generator,) = coordinator.call("start_generators", timeout_s=600)
    address = str(ray.get_runtime_context().gcs_address)
    command = [sys.executable, "-m", "jobs.cli", "status", str(run.path), "--address", address]
    os.kill(generator["pid"], signal.SIGSTOP)
    try:
        busy = coordinator.submit("generate", [GenerationRequest("one", (5, 6, 7))], Sampling(0.7, 8, 8191), 3)
        result = subprocess.run(command, cwd=MONITORING.parent, capture_output=True, text=True, timeout=600)
        assert not ray.wait([busy.ref], timeout=0)[0]
    finally:
        os.kill(generator["pid"], signal.SIGCONT)
    wait([busy], 600)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    shown = {row[0]: row[1:] for row in rows if row}
    (node,) = ray.nodes()
    assert shown["rl"][:2] == ["done", "2/2"]
    assert shown["generator-0"][:2] == ["alive", "3"] and shown["generator-0"][3] == node["NodeID"][:8]
    assert shown["coordinator"][0] == shown["scorer-0"][0] == "alive"
    assert "weights published: 3" in result.stdout


def test_a_run_is_scaled_from_the_command_line(coordinator: Remote, config: Config) -> None:
    """Up to the coordinator; test_scaling shows what follows. No node has room for the second scorer."""
    run = open_or_create(config, Path(config.runs_dir))
    address = str(ray.get_runtime_context().gcs_address)

    def scale(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.cli", "scale", str(run.path), *arguments]
        return subprocess.run(command, cwd=MONITORING.parent, capture_output=True, text=True, timeout=600)

    for count in (2, 1):
        answer = scale("--scorers", str(count), "--address", address)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout == f"wanted from now on: 1 generators, {count} scorers\n"
        assert coordinator.call("status", timeout_s=600).wanted == {"generator": 1, "scorer": count}
    refused = scale("--generators", "0", "--address", address)
    assert refused.returncode == 2 and "at least one is needed" in refused.stderr
    nobody = scale("--generators", "2")
    assert nobody.returncode == 2 and "scale: nobody works on" in nobody.stderr


def test_provisioning_names_files_that_are_there() -> None:
    """What compose mounts, and where Prometheus and Grafana look for it inside."""
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text(encoding="utf-8"))
    mounts = [mount.split(":")[:2] for service in compose["services"].values() for mount in service["volumes"]]
    inside = {there: MONITORING / here for here, there in mounts if here.startswith("./")}
    assert all(path.exists() for path in inside.values())
    provisioning = inside["/etc/grafana/provisioning"]
    providers = yaml.safe_load((provisioning / "dashboards/dashboards.yaml").read_text(encoding="utf-8"))["providers"]
    assert list(inside[providers[0]["options"]["path"]].glob("*.json"))
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].removeprefix("http://") in " ".join(compose["services"]["prometheus"]["command"])
