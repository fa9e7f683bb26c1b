"""Generation that runs ahead of the learner: the real coordinator, vLLM generator and scorer as Ray actors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from actors.pools.remote import Remote, wait
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.groups import Cursor
from actors.rollouts.weight_sync import Publication, publish
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

# A coordinator with a scorer and two starts of a generator. unit/test_rollouts has each event of it, e2e/test_interrupt
# a run that is ahead, and test_coordinator a generator that is killed at work.
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]

TINY = resolve_model("embedded:opt-tiny")
STEPS, PROMPTS, SAMPLES, STALENESS = 4, 3, 2, 2
RESPONSE = 80
NEVER = 8191
"""An id that is practically never sampled: every response has its full length."""


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), path)
    return path


@pytest.fixture(scope="module")
def coordinator(ray_cluster: None, reward_model: Path) -> Iterator[Remote]:
    settings = {
        "name": "ahead",
        "seed": 3,
        "data": {"max_prompt_tokens": 60, "max_response_tokens": RESPONSE},
        "rl": {
            "steps": STEPS,
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "max_staleness": STALENESS,
        },
        "resources": {
            "generators": {"kv_cache_mib": 64, "max_num_seqs": 2},  # slow: weights always meet responses under way
            "scorers": {"micro_batch_tokens": 600},
            "start_timeout_s": 600,
            "call_timeout_s": 600,
        },
    }
    config = parse_config(settings, "test")
    arguments = (config, TINY, 60 + RESPONSE, load_tokenizer(TINY).pad_token_id, False)
    remote = Remote.spawn("ahead", Coordinator, *arguments, local=False, options={"num_cpus": 0})
    started = remote.submit("start_generators")
    remote.call("start_scorers", str(reward_model), TINY, timeout_s=600)
    wait([started], 600)
    rng = np.random.default_rng(0)
    prompts = [EncodedPrompt(f"p{i}", tuple(int(x) for x in rng.integers(3, 8000, 20 + i))) for i in range(30)]
    remote.call("set_prompts", prompts, Sampling(0.7, RESPONSE, NEVER), timeout_s=600)
    yield remote
    remote.kill()


def changed(version: int) -> PreTrainedModel:
    """The policy of a version: each is another one."""
    model = load_policy(TINY)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def generated_tokens(coordinator: Remote) -> int:
    return int(coordinator.call("stats", timeout_s=600)[0]["tokens"])


def logprobs(model: PreTrainedModel, t: Trajectory) -> np.ndarray:
    """[R] of the sampled tokens, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor(t.token_ids)[None]).logits[0, len(t.prompt_ids) - 1 : -1] / 0.7
    return logits.log_softmax(-1).gather(1, torch.tensor(t.response_ids)[:, None])[:, 0].numpy()


def test_generation_goes_on_while_the_learner_trains(coordinator: Remote) -> None:
    """Through weight updates, a killed generator and a learner that comes back: each prompt once, tokens as stamped."""
    reference = load_policy(TINY)
    first = coordinator.call("next_version", timeout_s=600)
    models = {version: changed(version) for version in range(first + 1, first + STEPS + 3)}
    publications: list[Publication] = []  # kept alive, as by a learner
    batches: list[Batch] = []

    def step(number: int) -> Batch:
        version = coordinator.call("next_version", timeout_s=600)
        publications.append(publish(models[version].named_parameters(), version, local=False))
        coordinator.call("load_weights", publications[-1], timeout_s=600)
        batches.append(coordinator.call("next_batch", number, version, timeout_s=600))
        return batches[-1]

    coordinator.call("begin", Cursor(0), timeout_s=600)
    step(0)
    before = generated_tokens(coordinator)
    deadline = time.monotonic() + 600
    while generated_tokens(coordinator) < before + PROMPTS * RESPONSE:
        assert time.monotonic() < deadline, "the generator rests while the learner trains"
        time.sleep(0.2)

    pid = int(coordinator.call("start_generators", timeout_s=600)[0]["pid"])
    os.kill(pid, signal.SIGKILL)
    # The batch may be made of what was scored before; with the new weights there is work, which finds it dead.
    second = step(1)
    deadline = time.monotonic() + 600
    while (status := coordinator.call("status", timeout_s=600)).replacements["generator"] + status.actors[
        "generator"
    ] < 2:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    step(2)
    assert sum(batch.metrics["rollout/replacements"] for batch in batches) == 1
    assert int(coordinator.call("start_generators", timeout_s=600)[0]["pid"]) != pid

    # The learner died in step 2 and comes back from its checkpoint of step 1.
    batches.pop()
    coordinator.call("begin", second.cursor, timeout_s=600)
    step(2)
    step(3)

    assert batches[-1].cursor == Cursor(STEPS)
    version = coordinator.call("next_version", timeout_s=600)  # the generators serve whoever comes next
    publications.append(publish(reference.named_parameters(), version, local=False))
    coordinator.call("load_weights", publications[-1], timeout_s=600)
    request = GenerationRequest("other", (5, 6, 7))
    (other,) = coordinator.call("generate", [request], Sampling(0.7, 10, NEVER), version, timeout_s=600)
    np.testing.assert_allclose(other.generator_logprobs, logprobs(reference, other), atol=1e-4)

    trajectories = [(batch.version, t) for batch in batches for t in batch.trajectories]
    assert len({(t.prompt_id, t.sample_index) for _, t in trajectories}) == len(trajectories) == 4 * PROMPTS * SAMPLES
    ages = np.concatenate([version - t.versions for version, t in trajectories])
    assert ages.min() >= 0 and 0 < ages.max() <= STALENESS
    assert any(len(set(t.versions.tolist())) > 1 for _, t in trajectories), "no response saw new weights under way"
    for _, t in trajectories:
        assert len(t.response_ids) == RESPONSE and t.rewards and t.ref_logprobs is not None
        np.testing.assert_allclose(t.ref_logprobs, logprobs(reference, t), atol=1e-4)
        for version in set(t.versions.tolist()):
            own = t.versions == version
            np.testing.assert_allclose(t.generator_logprobs[own], logprobs(models[version], t)[own], atol=1e-4)
    idle = [{name: s for name, s in batch.metrics.items() if name.startswith("idle/")} for batch in batches]
    assert idle[0].keys() == {"idle/generator-0", "idle/scorer-0"}
    assert idle[1].keys() <= {"idle/generator-0", "idle/generator-1", "idle/scorer-0"}  # whoever was there at that time
    assert idle[-1].keys() == {"idle/generator-1", "idle/scorer-0"}
    assert all(0.0 <= share <= 1.0 for shares in idle for share in shares.values())
