"""The PPO loop with the real coordinator, vLLM and scorer, all in this process."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file

from actors.pools.remote import Remote
from actors.rollouts.batch import Batch
from actors.rollouts.coordinator import Coordinator
from actors.rollouts.publisher import AdapterPublication
from actors.rollouts.weight_sync import PublishedWeights, publish_directory
from actors.training.dev_answers import DevPrompt
from actors.training.rl import RLArguments, rl_loop
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.config_labellers import ReferenceLabellerConfig
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import encode_prompts
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.rewards.labellers import ReferenceLabeller
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

TINY = resolve_model("embedded:opt-tiny")
MAX_PROMPT, MAX_RESPONSE, MIN_RESPONSE = 96, 16, 9
STEPS = 3


def make_config(
    runs_dir: Path,
    lr: float = 1e-3,
    max_staleness: int = 0,
    lora: dict[str, Any] | None = None,
    updates: int = 2,
    looks: dict[str, Any] | None = None,
) -> Config:
    settings = {
        "name": "run",
        "runs_dir": str(runs_dir),
        "seed": 5,
        "model": {"lora": lora},
        "data": {"max_prompt_tokens": MAX_PROMPT, "max_response_tokens": MAX_RESPONSE},
        "rl": {
            "steps": STEPS,
            "prompts_per_step": 8,
            "samples_per_prompt": 2,
            "epochs": updates,
            "minibatches": updates,
            "temperature": 0.7,
            "max_staleness": max_staleness,
            "checkpoint_every": 1,
            "optimizer": {"lr": lr, "eps": 1e-5, "betas": (0.9, 0.999)},
            **(looks or {"sample_every": None}),
        },
        "resources": {"generators": {"kv_cache_mib": 64, "max_num_seqs": 32}},
    }
    return parse_config(settings, "test")


class Watched(Coordinator):
    """The coordinator; keeps a copy of every batch, and may be interrupted before it returns one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Batch] = []
        self.interrupt_at: int | None = None
        self.published: list[PublishedWeights] = []
        self.dev: list[DevPrompt] = []

    def load_weights(self, publication: PublishedWeights) -> int:
        self.published.append(publication)
        return super().load_weights(publication)

    def next_batch(self, step: int, version: int) -> Batch:
        batch = super().next_batch(step, version)
        if step == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(copy.deepcopy(batch))
        return batch


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "model"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), path, reward_bias=0.0)
    return path


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, reward_model: Path) -> Iterator[Watched]:
    config, tokenizer = make_config(tmp_path_factory.mktemp("unused")), load_tokenizer(TINY)
    own = Watched(config, TINY, MAX_PROMPT + MAX_RESPONSE, tokenizer.pad_token_id, True)
    records = read_demonstrations(config.data.demonstrations, "train", tokenizer, MAX_PROMPT)[:60]
    ids = encode_prompts(tokenizer, [r.prompt for r in records])
    labeller = ReferenceLabeller(ReferenceLabellerConfig(measure="rouge_l"))
    own.start_scorers(str(reward_model), TINY, GoldMeasure(labeller, records, tokenizer))
    own.start_generators()
    own.set_prompts(
        [EncodedPrompt(r.id, tuple(i)) for r, i in zip(records, ids, strict=True)],
        Sampling(0.7, MAX_RESPONSE, tokenizer.eos_token_id, min_tokens=MIN_RESPONSE),
    )
    encoded = [EncodedPrompt(r.id, tuple(i)) for r, i in zip(records, ids, strict=True)]
    own.dev = [DevPrompt(*pair) for pair in zip(encoded[:3], records[:3], strict=True)]
    yield own
    for worker in own.pools.generators.workers:
        worker.remote._target.engine.close()


def train(
    runs_dir: Path, coordinator: Watched, reward_model: Path, **settings: Any
) -> tuple[Path, list[dict[str, Any]]]:
    """Run or continue the PPO loop; the run folder and its valid metrics."""
    config = coordinator.config = make_config(runs_dir, **settings)
    run_dir = runs_dir / "run"
    coordinator_here = Remote("coordinator", coordinator, local=True)
    rl_loop(RLArguments(config, str(run_dir), "rl", 1, TINY, str(reward_model), coordinator_here, dev=coordinator.dev))
    return run_dir, read_metrics(run_dir, "rl")


def interrupted(step: int, runs_dir: Path, coordinator: Watched, reward_model: Path, **settings: Any) -> None:
    """A loop that ends as its batch of `step` arrives; `coordinator.seen` has the batches before."""
    coordinator.seen.clear()
    coordinator.interrupt_at = step
    with pytest.raises(KeyboardInterrupt):
        train(runs_dir, coordinator, reward_model, **settings)
    coordinator.interrupt_at = None


@pytest.fixture(scope="module")
def undisturbed(
    coordinator: Watched, reward_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]], list[Batch]]:
    coordinator.seen.clear()
    run_dir, metrics = train(tmp_path_factory.mktemp("undisturbed"), coordinator, reward_model)
    return run_dir, metrics, list(coordinator.seen)


def log_ratio(trajectory: Trajectory) -> NDArray[np.float64]:
    """[R] of the policy that sampled it to the reference, nats."""
    assert trajectory.ref_logprobs is not None
    return trajectory.generator_logprobs.astype(np.float64) - trajectory.ref_logprobs


def weights(directory: Path) -> torch.Tensor:
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_the_generator_follows_the_learner(undisturbed: tuple[Path, list[dict[str, Any]], list[Batch]]) -> None:
    """The learning rate is so high that samples of stale weights would be off by whole hundredths of a nat."""
    _, metrics, batches = undisturbed
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert abs(metrics[0]["rl/kl"]) < 1e-3
    lengths = [len(t.response_ids) for batch in batches for t in batch.trajectories if t.finish_reason == "eos"]
    assert min(lengths) > MIN_RESPONSE, "the EOS was left out of the softmax until then, by the learner too"
    assert all(line["memory/learner_peak_mib"] > 100 for line in metrics)
    for line, batch in zip(metrics, batches, strict=True):
        assert line["rl/logprob_gap/max"] < 1e-4
        assert line["rl/first_ratio_off_one"] < 1e-5
        assert batch.version == line["rl/weight_version"]
    for batch in batches[1:]:
        moved = [np.abs(log_ratio(t)) for t in batch.trajectories]
        assert np.concatenate(moved).mean() > 1e-2, "the policy must have moved, or this test shows nothing"
    versions = [batch.version for batch in batches]
    assert versions == list(range(versions[0], versions[0] + STEPS))


def test_the_metrics_are_those_of_the_batch(undisturbed: tuple[Path, list[dict[str, Any]], list[Batch]]) -> None:
    _, metrics, batches = undisturbed
    for line, batch in zip(metrics, batches, strict=True):
        own = batch.trajectories
        assert line["rl/length/mean"] == pytest.approx(np.mean([len(t.response_ids) for t in own]))
        kl = np.mean([log_ratio(t).sum() for t in own])
        assert line["rl/kl"] == pytest.approx(kl, abs=1e-3)
        score = np.mean([sum(t.rewards.values()) if t.finish_reason == "eos" else -1.0 for t in own])
        assert line["rl/score/mean"] == pytest.approx(score, abs=1e-5)
        assert line["rl/reward/mean"] == pytest.approx(score - 0.05 * kl, abs=1e-3)


def test_the_gold_measure_is_rouge_of_the_sampled_texts(
    undisturbed: tuple[Path, list[dict[str, Any]], list[Batch]],
) -> None:
    _, metrics, batches = undisturbed
    tokenizer = load_tokenizer(TINY)
    data = parse_config({"name": "x"}, "test").data.demonstrations
    references = {d.id: d.response for d in read_demonstrations(data, "train", tokenizer, MAX_PROMPT)}
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for line, batch in zip(metrics, batches, strict=True):
        gold = []
        for t in batch.trajectories:
            text = tokenizer.decode(t.response_ids, skip_special_tokens=True)
            gold.append(scorer.score(references[t.prompt_id], text)["rougeL"].fmeasure)
        assert len(set(gold)) > 1
        assert line["rl/gold/mean"] == pytest.approx(np.mean(gold), abs=1e-9)
        assert line["rl/gold/std"] == pytest.approx(np.std(gold), abs=1e-9)


def test_an_interrupted_loop_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: tuple[Path, list[dict[str, Any]], list[Batch]],
    coordinator: Watched,
    reward_model: Path,
    tmp_path: Path,
) -> None:
    """Also if it answers dev prompts in between, which the other did not: the batches do not notice."""
    whole, metrics, batches = undisturbed
    looks = {"eval_every": 1, "eval_prompts": 3, "sample_every": 2, "sample_prompts": 2}
    interrupted(2, tmp_path, coordinator, reward_model, looks=looks)
    run_dir = tmp_path / "run"
    assert not (run_dir / "policy").exists()
    assert len(list((run_dir / "checkpoints" / "rl").iterdir())) == 1  # as many as are to be kept
    _, continued = train(tmp_path, coordinator, reward_model, looks=looks)

    assert [batch.step for batch in coordinator.seen] == [0, 1, 2]  # none trained twice
    versions = [batch.version for batch in coordinator.seen]
    measured = read_metrics(run_dir, "rl_eval")
    assert [line["step"] for line in measured] == [0, 1, 2, 3]
    assert [line["rl_eval/weight_version"] for line in measured[:3]] == versions, "the policy that the step began with"
    assert abs(measured[0]["rl_eval/kl"]) < 1e-3 < abs(measured[3]["rl_eval/kl"])
    assert all(line["rl_eval/prompts"] == 3 and 0 < line["rl_eval/gold"] < 1 for line in measured)
    files = sorted((run_dir / "samples").iterdir())
    assert [file.name for file in files] == [f"step_00000{step}.jsonl" for step in (0, 2, 3)]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [(row["id"], row["weight_version"]) for row in rows] == [
        (d.prompt.id, versions[2]) for d in coordinator.dev[:2]
    ]
    assert versions[0] < versions[1] < versions[2] - 1  # published anew, under a version that nobody has seen
    for ours, theirs in zip(coordinator.seen, batches, strict=True):
        for one, other in zip(ours.trajectories, theirs.trajectories, strict=True):
            np.testing.assert_array_equal(one.response_ids, other.response_ids)
    for line, expected in zip(continued, metrics, strict=True):
        for name in ("rl/kl", "rl/score/mean", "rl/policy_loss", "rl/value_loss", "rl/grad_norm", "rl/lr"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    end, expected_end, start = (weights(path) for path in (run_dir / "policy", whole / "policy", Path(TINY)))
    assert (end - expected_end).norm() < 1e-4 * (expected_end - start).norm()


def test_an_interrupted_loop_that_runs_ahead_trains_each_prompt_once(
    undisturbed: tuple[Path, list[dict[str, Any]], list[Batch]],
    coordinator: Watched,
    reward_model: Path,
    tmp_path: Path,
) -> None:
    """The same prompts and seeds as in turn, in some order, and no token older than it may be."""
    _, _, batches = undisturbed
    looks = {"sample_every": 2, "sample_prompts": 2}  # for which the generators stop to run ahead
    interrupted(1, tmp_path, coordinator, reward_model, max_staleness=2, looks=looks)
    run_dir, metrics = train(tmp_path, coordinator, reward_model, max_staleness=2, looks=looks)
    assert [file.stem for file in sorted((run_dir / "samples").iterdir())] == [
        "step_000000",
        "step_000002",
        "step_000003",
    ]

    assert [batch.step for batch in coordinator.seen] == list(range(STEPS))
    ours, expected = (
        sorted((t.prompt_id, t.seed) for batch in run for t in batch.trajectories)
        for run in (coordinator.seen, batches)
    )
    assert ours == expected
    stale = [batch.version - np.concatenate([t.versions for t in batch.trajectories]) for batch in coordinator.seen]
    assert max(ages.max() for ages in stale) > 0, "everything was fresh, so this test shows nothing"
    for line, ages in zip(metrics, stale, strict=True):
        assert line["rollout/staleness/max"] == ages.max() <= 2
        assert line["rollout/staleness/mean"] == pytest.approx(ages.mean())
        assert line["rl/first_ratio_off_one"] < 1e-5
        assert (line["rl/logprob_gap/max"] > 1e-3) == (ages.max() > 0)
        assert (abs(line["rl/importance_weight/mean"] - 1.0) > 1e-4) == (ages.max() > 0)


def test_after_an_early_stop_ahead_of_the_learner_generators_take_the_weights_of_the_next_stage(
    coordinator: Watched, reward_model: Path, tmp_path: Path
) -> None:
    """Generators that still ran ahead would load them with their next batch, which never comes."""
    looks = {"sample_every": None, "eval_every": 1, "eval_prompts": 2, "select": "gold", "patience": 1}
    _, metrics = train(tmp_path, coordinator, reward_model, lr=1e-12, max_staleness=2, looks=looks)
    assert 0 < len(metrics) < STEPS, "answers that stay the same are no better ones"
    version = coordinator.next_version()
    coordinator.load_weights(publish_directory(TINY, version, local=True))
    prompt = coordinator.dev[0].encoded
    request = GenerationRequest(prompt.id, prompt.ids, 0, 1)
    assert coordinator.sampling is not None
    (answer,) = coordinator.generate([request], coordinator.sampling, version)
    assert answer.versions.tolist() == [version] * len(answer.response_ids)


def test_with_lora_only_adapters_travel_and_training_resumes_exactly(
    coordinator: Watched, reward_model: Path, tmp_path: Path
) -> None:
    """Generators serve the merged policy: their log-probs are the learner's, whose adapters have moved."""
    lora = {"rank": 4, "alpha": 32, "target_modules": ["q_proj", "v_proj", "fc1"]}
    coordinator.seen.clear()
    coordinator.published.clear()
    whole, metrics = train(tmp_path / "whole", coordinator, reward_model, lora=lora, lr=1e-2)
    batches = list(coordinator.seen)
    assert abs(metrics[0]["rl/kl"]) < 1e-3
    assert all(line["rl/logprob_gap/max"] < 1e-4 for line in metrics)
    for batch in batches[1:]:
        moved = [np.abs(log_ratio(t)) for t in batch.trajectories]
        assert np.concatenate(moved).mean() > 1e-2, "the policy must have moved, or this test shows nothing"
    assert len(coordinator.published) == STEPS
    for publication in coordinator.published:
        assert isinstance(publication, AdapterPublication)
        assert publication.frozen is coordinator.published[0].frozen  # type: ignore[attr-defined]

    start, end = (load_file(path / "model.safetensors") for path in (Path(TINY), whole / "policy"))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {
        name for name in start if name.split(".")[-2] in ("q_proj", "v_proj", "fc1") and "bias" not in name
    }
    for name in changed:
        assert torch.linalg.matrix_rank(end[name] - start[name], rtol=1e-3) <= 4

    interrupted(2, tmp_path / "broken", coordinator, reward_model, lora=lora, lr=1e-2)
    run_dir, continued = train(tmp_path / "broken", coordinator, reward_model, lora=lora, lr=1e-2)
    assert [batch.step for batch in coordinator.seen] == list(range(STEPS))
    for line, expected in zip(continued, metrics, strict=True):
        for key in ("rl/kl", "rl/policy_loss", "rl/value_loss", "rl/grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    ended, expected_end, began = (weights(path) for path in (run_dir / "policy", whole / "policy", Path(TINY)))
    assert (ended - expected_end).norm() < 1e-4 * (expected_end - began).norm()


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(
    coordinator: Watched, reward_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=r"is not finite|norm is (nan|inf)") as raised:
        train(tmp_path, coordinator, reward_model, lr=1e18)
    assert not (tmp_path / "run" / "policy").exists()
    assert "there was no checkpoint yet" in str(raised.value), "the second update of the first step is refused"


def test_a_model_that_its_last_update_broke_is_not_kept(
    coordinator: Watched, reward_model: Path, tmp_path: Path
) -> None:
    """A step of one update, whose gradient is finite and whose learning rate is beyond float32."""
    with pytest.raises(FloatingPointError, match="rl: the policy has weights that are not finite") as raised:
        train(tmp_path, coordinator, reward_model, lr=1e39, updates=1)
    assert not list((tmp_path / "run" / "checkpoints" / "rl").glob("*"))
    assert "there was no checkpoint yet" in str(raised.value)
