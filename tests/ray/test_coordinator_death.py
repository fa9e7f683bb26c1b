"""A coordinator that is killed by SIGKILL: another one takes its place, and a run ends as if nothing had happened.

One coordinator with vLLM and a scorer serves all tests, and its successors do. It kills itself when something happens
that a test has asked for, because whoever kills it from outside would be early or late.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.pools.remote import ActorDied, Remote, namespace, wait
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator import Coordinator
from actors.training.dev_answers import DevPrompt
from actors.training.loopback import join_ranks
from actors.training.rl import RLArguments, rl_loop
from actors.training.tasks import StopRequest
from jobs.rollouts import RolloutClient
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import encode_prompts
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.ledger import read_ledger
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

pytestmark = pytest.mark.usefixtures("ray_cluster")

TINY = resolve_model("embedded:opt-tiny")
STEPS, PER_STEP = 3, 4
OF_THE_MACHINE = ("time", "throughput/", "memory/", "idle/", "rollout/replacements", "rollout/learner_wait")


def make_config(runs_dir: Path, max_staleness: int = 0) -> Config:
    settings = {
        "name": "run",
        "runs_dir": str(runs_dir),
        "seed": 5,
        "data": {"max_prompt_tokens": 96, "max_response_tokens": 12},
        "rl": {
            "steps": STEPS, "prompts_per_step": PER_STEP, "samples_per_prompt": 2, "epochs": 1, "minibatches": 1,
            "max_staleness": max_staleness, "optimizer": {"lr": 1e-3},
            "sample_every": None, "eval_every": 2, "eval_prompts": 2,
        },
        "resources": {
            "generators": {"cpus": 0.5, "kv_cache_mib": 64, "max_num_seqs": 32},
            "scorers": {"cpus": 0.5},
            "start_timeout_s": 600,
            "call_timeout_s": 600,
        },
    }  # fmt: skip
    return parse_config(settings, "test")


class Mortal(Coordinator):
    """Dies by SIGKILL at events, of which each is a file in the directory of `config.runs_dir`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.events = Path(self.config.runs_dir)

    def pid(self) -> int:
        return os.getpid()

    def use(self, config: Config) -> None:
        self.config = config

    def take_over(self, *args: Any) -> None:
        self._now("take over")
        super().take_over(*args)

    def next_batch(self, step: int, version: int) -> Batch:
        first = self.batch is None or self.batch.step != step
        batch = super().next_batch(step, version)
        self._now(f"batch {step}" if first else f"batch {step} for another rank")
        return batch

    def draw(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory | None]:
        drawn = super().draw(requests, sampling, version)
        self._now("draw")
        return drawn

    def _now(self, event: str) -> None:
        """This happens, and nobody knows it yet."""
        for file in sorted(self.events.glob(f"{event}.*"))[:1]:
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


class Rank:
    """A learner rank in a process of its own."""

    def __init__(self, rank: int, meeting: str) -> None:
        join_ranks("gloo", rank, 2, meeting)

    def train(self, arguments: RLArguments) -> None:
        rl_loop(arguments)


class KillsAfterStep(StopRequest):
    """Asks no loop to stop. After a step it kills the coordinator, and another one is there before the next step."""

    def __init__(self, coordinator: Remote, step: int) -> None:
        super().__init__()
        self.coordinator, self.left = coordinator, step

    def stop_requested(self) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(self.coordinator.call("pid", timeout_s=600), signal.SIGKILL)
            self.coordinator.wait_until_back(600)
        return False


@pytest.fixture(scope="module")
def announced() -> list[str]:
    """What the driver has heard."""
    return []


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), path)
    return path


@pytest.fixture(scope="module")
def dev() -> list[DevPrompt]:
    """Prompts; those of the batches are the same."""
    tokenizer = load_tokenizer(TINY)
    records = read_demonstrations(make_config(Path("/unused")).data.demonstrations, "train", tokenizer, 96)[:30]
    ids = encode_prompts(tokenizer, [r.prompt for r in records])
    return [DevPrompt(EncodedPrompt(r.id, tuple(own)), r) for r, own in zip(records, ids, strict=True)]


@pytest.fixture(scope="module")
def rollouts(
    ray_cluster: None,
    announced: list[str],
    reward_model: Path,
    dev: list[DevPrompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RolloutClient]:
    """The driver's line to the coordinator, which has its actors, prompts and weights."""
    config = make_config(tmp_path_factory.mktemp("events"))
    starts: Any = SimpleNamespace(base=TINY, reward_model=str(reward_model))
    client = RolloutClient(config, starts, load_tokenizer(TINY), False, lambda line, whole: announced.append(line))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.rollouts.Coordinator", Mortal)
        client.start()
    client.start_scorers([each.prompt for each in dev], TINY, None, str(reward_model))
    client.start().tell("use", config)
    client.start().tell("set_prompts", [each.encoded for each in dev], client.sampling(config.rl.draw))
    yield client
    client.close()


def at(rollouts: RolloutClient, *events: str) -> None:
    """The coordinator is to die when this happens, once for each time that it is named."""
    for event in events:
        (Path(rollouts.config.runs_dir) / f"{event}.{uuid.uuid4().hex}").touch()


def happened(rollouts: RolloutClient) -> bool:
    return not list(Path(rollouts.config.runs_dir).iterdir())


def arguments(rollouts: RolloutClient, config: Config, reward_model: Path, dev: list[DevPrompt]) -> RLArguments:
    link = rollouts.start()
    link.tell("use", config)
    return RLArguments(
        config, str(Path(config.runs_dir) / "run"), "rl", 1, TINY, str(reward_model), link.remote, dev=dev,
        setup=link.setup,
    )  # fmt: skip


def found(config: Config) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The policy, and the metrics that are not of the machine, with versions that count from the first one."""
    run = Path(config.runs_dir) / "run"
    lines = [*read_metrics(run, "rl"), *read_metrics(run, "rl_eval")]
    first = lines[0]["rl/weight_version"]
    for line in lines:
        for name in ("rl/weight_version", "rl_eval/weight_version"):
            if name in line:
                line[name] -= first
    metrics = [{k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)} for line in lines]
    return load_file(run / "policy" / "model.safetensors"), metrics


def assert_equal(config: Config, undisturbed: Config) -> None:
    """To the last bit."""
    (ours, own_metrics), (theirs, metrics) = found(config), found(undisturbed)
    assert own_metrics == metrics
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_rebuilt(rollouts: RolloutClient, before: list[dict[str, Any]]) -> None:
    """Generators and scorers of the one that died are gone, and as many as are wanted have taken their places."""
    for place in before:
        assert not Path(f"/proc/{place['pid']}").exists()
    status = rollouts.start().call("status")
    assert status.actors == status.wanted == {"generator": 1, "scorer": 1}
    assert ray.get_actor("generator-0", namespace(rollouts.config))


def test_a_learner_ends_with_the_weights_of_an_undisturbed_one(
    rollouts: RolloutClient, reward_model: Path, dev: list[DevPrompt], tmp_path: Path
) -> None:
    """The second batch is made, and has not arrived."""
    config, undisturbed = make_config(tmp_path / "disturbed"), make_config(tmp_path / "undisturbed")
    rl_loop(arguments(rollouts, undisturbed, reward_model, dev))
    before = rollouts.start().call("start_generators")
    at(rollouts, "batch 1")
    rl_loop(arguments(rollouts, config, reward_model, dev))
    assert happened(rollouts)
    assert_rebuilt(rollouts, before)
    assert_equal(config, undisturbed)


# Another start of the actors, and two processes that import torch; the first test has the same with one rank.
@pytest.mark.long
def test_two_ranks_ask_another_coordinator_if_only_one_has_its_batch(
    rollouts: RolloutClient, reward_model: Path, dev: list[DevPrompt], tmp_path: Path
) -> None:
    ranks = [
        Remote.spawn(f"rank-{rank}", Rank, rank, str(tmp_path / "meeting"), local=False, options={"num_cpus": 0})
        for rank in range(2)
    ]
    configs = make_config(tmp_path / "disturbed"), make_config(tmp_path / "undisturbed")
    for config, events in zip(configs, (["batch 1 for another rank"], []), strict=True):
        at(rollouts, *events)
        args = arguments(rollouts, config, reward_model, dev)
        wait([rank.submit("train", args) for rank in ranks], 600)
        assert happened(rollouts)
    assert_equal(*configs)
    for rank in ranks:
        rank.kill()


# Another start of the actors.
@pytest.mark.long
def test_ahead_of_the_learner_each_prompt_is_trained_once(
    rollouts: RolloutClient, reward_model: Path, dev: list[DevPrompt], tmp_path: Path
) -> None:
    """It dies while the learner trains, and another one is up before the learner asks for anything."""
    config = make_config(tmp_path, max_staleness=1)
    args = arguments(rollouts, config, reward_model, dev)
    stop = Remote("stop", KillsAfterStep(args.coordinator, 2), local=True)
    rl_loop(replace(args, stop=stop))
    ledger = read_ledger(RunFolder(str(tmp_path / "run")))
    assert [line["step"] for line in ledger] == [1, 2, 3]
    assert len({group["prompt"] for line in ledger for group in line["groups"]}) == STEPS * PER_STEP
    for line in ledger:
        versions = [group[age] for group in line["groups"] for age in ("oldest", "newest")]
        assert line["version"] - 1 <= min(versions) <= max(versions) <= line["version"]


# Another engine; the first test has a death that the learner finds.
@pytest.mark.long
def test_the_driver_gets_the_same_trajectories(
    rollouts: RolloutClient, dev: list[DevPrompt], announced: list[str], tmp_path: Path
) -> None:
    """Also their scores, for which the scorers were started before; and the user is told."""
    prompts = [each.encoded for each in dev[:8]]
    drawn: list[list[Trajectory]] = []
    for events in ([], ["draw"]):
        at(rollouts, *events)
        rollouts.starts.run = RunFolder(str(tmp_path / str(len(drawn))))
        version = rollouts.load_weights(TINY)
        answers = rollouts.generate(prompts, rollouts.config.rl.draw, version, "any", samples=2)
        drawn.append(rollouts.score(answers, 1.0))
        assert happened(rollouts)
    for ours, theirs in zip(*drawn, strict=True):
        assert ours.prompt_id == theirs.prompt_id and ours.rewards == theirs.rewards
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        assert ours.generator_logprobs.tolist() == theirs.generator_logprobs.tolist()
    rollouts.stop_listening()
    (line,) = [line for line in announced if " during draw: " in line]
    assert re.match("coordinator died during draw: its process ended at once: .*; another one takes its place$", line)


# Three starts of a coordinator.
@pytest.mark.long
def test_the_third_death_without_any_work_ends_the_run(
    rollouts: RolloutClient, dev: list[DevPrompt], tmp_path: Path
) -> None:
    rollouts.starts.run = RunFolder(str(tmp_path))
    version = rollouts.load_weights(TINY)
    at(rollouts, "draw", "take over", "take over")
    with pytest.raises(ActorDied) as raised:
        rollouts.generate([dev[0].encoded], rollouts.config.rl.draw, version, "any")
    assert re.match(
        r"coordinator died during take_over: .*; 3 coordinators in a row died before they did any work",
        str(raised.value),
    )
    assert happened(rollouts) and len(str(raised.value)) <= 300 and "\n" not in str(raised.value)
