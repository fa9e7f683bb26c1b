"""The real coordinator as a Ray actor, with vLLM generators and scorers on the embedded model.

The tests share it and follow one another, because to start a generator takes longer than any of them:

    generators 0            batches, versions
               0 1          scaled up; the samples stay the same
                 1, 2 ...   0 is killed at work: 1 does the rest, 2 is on its way
                    2       1 is killed before a weight load, which waits for 2
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from actors.pools.remote import ActorFailure, Call, Remote, namespace, wait
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.weight_sync import publish, publish_directory
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, requests_for
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import encode_prompts
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory, derive_seed

pytestmark = pytest.mark.usefixtures("ray_cluster")

TINY = resolve_model("embedded:opt-tiny")
TEMPERATURE = 0.7
MAX_PROMPT, MAX_RESPONSE, MIN_RESPONSE = 96, 40, 12
BIAS = 0.25


@pytest.fixture(scope="module")
def config() -> Config:
    settings = {
        "name": "coordinator",
        "seed": 5,
        "data": {"max_prompt_tokens": MAX_PROMPT, "max_response_tokens": MAX_RESPONSE},
        "rl": {"prompts_per_step": 6, "samples_per_prompt": 2, "temperature": TEMPERATURE},
        "resources": {
            # Two of each have to fit the two CPUs of the cluster.
            "generators": {"cpus": 0.5, "kv_cache_mib": 64, "max_num_seqs": 32},
            "scorers": {"cpus": 0.5, "micro_batch_tokens": 600},
            "start_timeout_s": 600,
            "call_timeout_s": 600,
        },
    }
    return parse_config(settings, "test")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a fresh head and a bias."""
    path = tmp_path_factory.mktemp("reward") / "model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), path, reward_bias=BIAS)
    return path


@pytest.fixture(scope="module")
def prompts(config: Config) -> list[EncodedPrompt]:
    tokenizer = load_tokenizer(TINY)
    records = read_demonstrations(config.data.demonstrations, "train", tokenizer, MAX_PROMPT)[:40]
    ids = encode_prompts(tokenizer, [r.prompt for r in records])
    return [EncodedPrompt(r.id, tuple(own)) for r, own in zip(records, ids, strict=True)]


@pytest.fixture(scope="module")
def sampling() -> Sampling:
    return Sampling(TEMPERATURE, MAX_RESPONSE, load_tokenizer(TINY).eos_token_id, min_tokens=MIN_RESPONSE)


@pytest.fixture(scope="module")
def coordinator(
    ray_cluster: None, config: Config, reward_model: Path, prompts: list[EncodedPrompt], sampling: Sampling
) -> Iterator[Remote]:
    """Ready for `next_batch(step, 1)`: the policy is the reference itself."""
    arguments = (config, TINY, MAX_PROMPT + MAX_RESPONSE, load_tokenizer(TINY).pad_token_id, False)
    remote = Remote.spawn("coordinator", Coordinator, *arguments, local=False, options={"num_cpus": 0})
    started = remote.submit("start_generators")
    scorers = remote.call("start_scorers", str(reward_model), TINY, timeout_s=600)
    assert [s["name"] for s in scorers] == ["scorer-0"]
    assert len(wait([started], 600)[0]) == 1
    remote.call("set_prompts", prompts, sampling, timeout_s=600)
    version = remote.call("next_version", timeout_s=600)
    assert version == remote.call("load_weights", publish_directory(TINY, version, local=False), timeout_s=600) == 1
    yield remote
    remote.kill()


@pytest.fixture(scope="module")
def first(coordinator: Remote) -> Batch:
    return coordinator.call("next_batch", 0, 1, timeout_s=600)


def generated_tokens(coordinator: Remote) -> int:
    return int(coordinator.call("stats", timeout_s=600)[0]["tokens"])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def running(call: Call) -> bool:
    return not ray.wait([call.ref], timeout=0)[0]


def grow(coordinator: Remote, sampling: Sampling, version: int, scored: Sequence[Trajectory]) -> None:
    """Two generators and two scorers from now on; returns when they have joined, between two pieces of work."""
    assert coordinator.call("scale", 2, 2, timeout_s=600) == {"generator": 2, "scorer": 2}
    deadline = time.monotonic() + 600
    while coordinator.call("status", timeout_s=600).actors != {"generator": 2, "scorer": 2}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        coordinator.call("generate", [GenerationRequest("any", (5, 6, 7))], sampling, version, timeout_s=600)
        coordinator.call("score", scored, TEMPERATURE, timeout_s=600)


def length(trajectories: Sequence[Trajectory]) -> int:
    """Sampled tokens."""
    return sum(len(t.response_ids) for t in trajectories)


def plain_logprobs(model: PreTrainedModel, t: Trajectory) -> NDArray[np.float32]:
    """[R] by transformers, without the EOS where the response is too short for it."""
    with torch.no_grad():
        logits = model(torch.tensor(t.token_ids)[None]).logits[0, len(t.prompt_ids) - 1 : -1] / TEMPERATURE
    logits[:MIN_RESPONSE, load_tokenizer(TINY).eos_token_id] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(t.response_ids)[:, None])[:, 0].numpy()


def assert_same_samples(ours: Sequence[Trajectory], theirs: Sequence[Trajectory]) -> None:
    """The same prompts, seeds and tokens, in the same order."""
    assert [(t.prompt_id, t.sample_index, t.seed) for t in ours] == [
        (t.prompt_id, t.sample_index, t.seed) for t in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.generator_logprobs, other.generator_logprobs, atol=1e-4)


def test_a_batch_holds_the_prompts_of_its_step(
    coordinator: Remote, first: Batch, config: Config, prompts: list[EncodedPrompt]
) -> None:
    assert (first.step, first.version) == (0, 1)
    chosen = [prompts[i] for i in prompts_of_step(len(prompts), 5, 0, 6)]
    assert [t.prompt_id for t in first.trajectories] == [p.id for p in chosen for _ in range(2)]
    for trajectory, prompt in zip(first.trajectories[::2], chosen, strict=True):
        assert tuple(trajectory.prompt_ids) == prompt.ids
    seeds = [derive_seed(5, "ppo", 0, t.prompt_id, t.sample_index) for t in first.trajectories]
    assert [t.seed for t in first.trajectories] == seeds and len(set(seeds)) == 12
    for t in first.trajectories:
        assert set(t.versions.tolist()) == {1} and len(t.versions) == len(t.response_ids) <= MAX_RESPONSE
    assert first.metrics["rollout/replacements"] == 0
    assert first.metrics["time/generate"] > 0 and first.metrics["time/score"] > 0


def test_asking_again_gives_the_same_batch(coordinator: Remote, first: Batch) -> None:
    before = generated_tokens(coordinator)
    again = coordinator.call("next_batch", 0, 1, timeout_s=600)
    assert_same_samples(again.trajectories, first.trajectories)
    assert again.metrics == first.metrics
    assert generated_tokens(coordinator) == before, "nothing is to be generated again"


def test_reference_logprobs_equal_the_generators_own(first: Batch) -> None:
    """Policy and reference are the same model: vLLM and the scorer must agree on every token; so must transformers."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    for t in first.trajectories:
        assert t.ref_logprobs is not None
        np.testing.assert_allclose(t.ref_logprobs, t.generator_logprobs, atol=1e-4)
        np.testing.assert_allclose(t.ref_logprobs, plain_logprobs(model, t), atol=1e-4)


def test_rewards_do_not_depend_on_the_batch(coordinator: Remote, first: Batch, reward_model: Path) -> None:
    """Scored among others of other lengths, alone, and by a plain loader row by row."""
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32).eval()
    for t in first.trajectories:
        ((name, ours),) = t.rewards.items()
        alone = coordinator.call("score", [t], TEMPERATURE, timeout_s=600)[0]
        assert alone.rewards[name] == pytest.approx(ours, abs=1e-5)
        with torch.no_grad():
            score = float(plain(torch.tensor(t.token_ids)[None]).logits[0, 0])
        assert ours == pytest.approx(score + BIAS, abs=1e-5)
    assert np.std([sum(t.rewards.values()) for t in first.trajectories]) > 1e-3


def test_versions_that_no_generator_holds_are_refused(coordinator: Remote, first: Batch) -> None:
    for version in (0, 2):
        with pytest.raises(ActorFailure, match=f"generator-0 has version 1, wanted is {version}"):
            coordinator.call("next_batch", 3, version, timeout_s=600)
    stale = publish_directory(TINY, 1, local=False)
    with pytest.raises(ActorFailure, match="generator-0 has version 1, refuses 1"):
        coordinator.call("load_weights", stale, timeout_s=600)
    assert coordinator.call("next_version", timeout_s=600) == 2
    assert coordinator.call("next_version", 10, timeout_s=600) == 11  # a restored learner knows of later ones


def test_answers_outside_the_batches_change_none(
    coordinator: Remote, first: Batch, sampling: Sampling, prompts: list[EncodedPrompt]
) -> None:
    requests = requests_for(prompts[:3], 2, 5, "outside")
    version = coordinator.call("next_version", timeout_s=600)
    with pytest.raises(ActorFailure, match=f"answer: load weights of version {version} before it"):
        coordinator.call("answer", requests, sampling, version, timeout_s=600)
    coordinator.call("load_weights", publish_directory(TINY, version, local=False), timeout_s=600)
    answers = coordinator.call("answer", requests, sampling, version, timeout_s=600)
    alone = coordinator.call("generate", requests, sampling, version, timeout_s=600)
    assert_same_samples(answers, alone)
    for answer, scored in zip(answers, coordinator.call("score", alone, TEMPERATURE, timeout_s=600), strict=True):
        assert answer.rewards == pytest.approx(scored.rewards, abs=1e-5) and answer.ref_logprobs is not None
    again = coordinator.call("next_batch", 0, version, timeout_s=600)
    assert_same_samples(again.trajectories, first.trajectories)


def test_the_samples_do_not_depend_on_who_makes_them(coordinator: Remote, first: Batch, sampling: Sampling) -> None:
    """Scaled up, the coordinator gives the newcomers the weights, and the batch of a step is the same."""
    version = coordinator.call("next_version", timeout_s=600)
    coordinator.call("load_weights", publish_directory(TINY, version, local=False), timeout_s=600)
    grow(coordinator, sampling, version, first.trajectories[:1])
    before = coordinator.call("stats", timeout_s=600)
    batch = coordinator.call("next_batch", 0, version, timeout_s=600)
    assert batch.metrics["rollout/generators"] == 2
    assert_same_samples(batch.trajectories, first.trajectories)
    for ours, theirs in zip(batch.trajectories, first.trajectories, strict=True):
        assert sum(ours.rewards.values()) == pytest.approx(sum(theirs.rewards.values()), abs=1e-5)
    sampled = [
        after["tokens"] - earlier["tokens"]
        for earlier, after in zip(before, coordinator.call("stats", timeout_s=600), strict=True)
    ]
    assert sampled == [length(first.trajectories[:6]), length(first.trajectories[6:])]
    with pytest.raises(UserError, match="scale: 0 generators; at least one is needed"):
        coordinator.call("scale", 0, timeout_s=600)


def test_a_generator_killed_at_work_is_replaced_and_the_rest_of_its_work_done_again(
    coordinator: Remote, first: Batch, config: Config, prompts: list[EncodedPrompt], sampling: Sampling
) -> None:
    publication = publish_directory(TINY, 20, local=False)
    coordinator.call("load_weights", publication, timeout_s=600)
    requests = requests_for(prompts, 12, 5, "killed")
    undisturbed = coordinator.call("generate", requests, sampling, 20, timeout_s=600)
    own, others = undisturbed[: len(requests) // 2], undisturbed[len(requests) // 2 :]
    for _ in range(5):  # a generator may be done before the kill reaches it: another try
        grow(coordinator, sampling, 20, first.trajectories[:1])
        victim, _ = coordinator.call("start_generators", timeout_s=600)
        names = coordinator.call("status", timeout_s=600).versions  # in the same order
        actors = [ray.get_actor(name, namespace(config)) for name in names]
        before = ray.get([actor.stats.remote() for actor in actors], timeout=600)
        call = coordinator.submit("generate", requests, sampling, 20)
        while not (handed_over := ray.get(actors[0].stats.remote(), timeout=600)["tokens"] - before[0]["tokens"]):
            assert running(call)
        kill(victim["pid"])
        assert_same_samples(wait([call], 600)[0], undisturbed)
        done_again = ray.get(actors[1].stats.remote(), timeout=600)["tokens"] - before[1]["tokens"] - length(others)
        coordinator.call("generate", requests[:2], sampling, 20, timeout_s=600)  # finds it dead at the latest
        assert victim["pid"] not in [place["pid"] for place in coordinator.call("start_generators", timeout_s=600)]
        if done_again:
            break
    assert 0 < done_again <= length(own) - handed_over
    assert coordinator.call("status", timeout_s=600).wanted["generator"] == 2


# Two more engines; the test before it has a generator that dies at work, and ray/test_coordinator_death all of them.
@pytest.mark.long
def test_generators_killed_before_a_weight_load(coordinator: Remote, reward_model: Path) -> None:
    """The replacement gets the weights of the load, once. A scorer dies, too; the next batch counts them all."""
    scorer, *_ = coordinator.call("start_scorers", str(reward_model), TINY, timeout_s=600)
    policy = load_policy(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    publication = publish(policy.named_parameters(), 21, local=False)
    coordinator.call("next_batch", 7, 20, timeout_s=600)  # reports what died before
    generators = coordinator.call("start_generators", timeout_s=600)
    names = list(coordinator.call("status", timeout_s=600).versions)
    for place in generators:
        kill(place["pid"])
    assert coordinator.call("load_weights", publication, timeout_s=600) == 21
    kill(scorer["pid"])
    batch = coordinator.call("next_batch", 1, 21, timeout_s=600)
    assert batch.metrics["rollout/replacements"] == len(generators) + 1
    _, announced = coordinator.call("announcements", "", 0, timeout_s=600)
    said = [announcement.line for announcement in announced]
    for name in [*names, scorer["name"]]:  # what the driver shows to the user
        (line,) = (line for line in said if line.startswith(f"{name} died during "))
        assert re.search(r"on their way: .*; \d of \d replacements left$", line), line
    assert all(t.rewards and t.ref_logprobs is not None for t in batch.trajectories)
    for t in batch.trajectories:
        np.testing.assert_allclose(t.generator_logprobs, plain_logprobs(policy, t), atol=1e-4)
    gap = np.concatenate([np.abs(t.generator_logprobs - t.ref_logprobs) for t in batch.trajectories])
    assert gap.mean() > 1e-2, "the new weights must differ from the reference, or this test shows nothing"


def test_a_coordinator_without_scorers_says_so(config: Config) -> None:
    own: Any = Coordinator(config, TINY, 100, 1, True)
    with pytest.raises(ActorFailure, match="before start_scorers"):
        own.score([], 1.0)
