"""One RL step with real (tiny, random) models: what has to hold whatever the data."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OPTForCausalLM, OPTForSequenceClassification

from rayrlhf.algorithms.trainer import Trainer
from rayrlhf.config_rl import PPOConfig
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, replacements_of_step, requests_for
from rayrlhf.data.rows import Row
from rayrlhf.models.batching import collate
from rayrlhf.models.logprobs import sequence_scores, token_values
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Trajectory
from tests.tiny import EOS, PAD, TEMPERATURE, VOCABULARY, critic_of, flat, tiny_models, trainer_of, with_sgd


@pytest.fixture
def models() -> tuple[OPTForCausalLM, OPTForSequenceClassification]:
    return tiny_models()


def config(**changes: Any) -> PPOConfig:
    optimizer = OptimizerConfig(lr=1e-3, betas=(0.9, 0.999), eps=1e-5, max_grad_norm=1e9, schedule="constant")
    base = PPOConfig(prompts_per_step=4, samples_per_prompt=2, epochs=1, temperature=TEMPERATURE, optimizer=optimizer)
    return base.model_copy(update=changes)


def trajectories(policy: OPTForCausalLM, count: int = 8, seed: int = 0) -> list[Trajectory]:
    """Random prompts and responses of mixed lengths with log-probs from full, unpadded transformers passes."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        prompt = rng.integers(3, VOCABULARY, rng.integers(2, 12))
        response = rng.integers(3, VOCABULARY, rng.integers(1, 9))
        ended = i % 3 != 0
        if ended:
            response[-1] = EOS
        with torch.no_grad():
            logits = policy(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0]
        logprobs = (logits / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = logprobs[torch.arange(len(response)), torch.from_numpy(response)].numpy()
        out.append(
            Trajectory(
                f"p{i // 2}",
                i % 2,
                i,
                prompt,
                response,
                chosen,
                np.zeros(len(response), np.int64),
                "eos" if ended else "length",
                {"reward_model": float(rng.normal())},
                chosen.copy(),
            )
        )
    return out


def learner(models: tuple[Any, Any], cfg: PPOConfig) -> Trainer:
    policy, value = copy.deepcopy(models)
    return trainer_of(policy, value, cfg)


def weights(rl: Trainer) -> torch.Tensor:
    return torch.cat([flat(model.parameters()) for model in (rl.policy.model, critic_of(rl).forward.model)])


def test_first_update_of_the_reference_itself(models: tuple[Any, Any]) -> None:
    """Policy equal to the reference: KL 0; first mini-batch: ratio 1; the generator agrees with the learner."""
    batch = trajectories(models[0])
    metrics = learner(models, config(epochs=1)).step(batch, 0)
    assert metrics["rl/kl"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["rl/logprob_gap/max"] < 1e-4
    assert metrics["rl/first_ratio_off_one"] < 1e-6
    assert metrics["rl/approx_kl"] < 1e-10
    assert metrics["rl/clip_fraction"] == 0.0
    ended = [t.finish_reason == "eos" for t in batch]
    expected = [t.rewards["reward_model"] if e else -1.0 for t, e in zip(batch, ended, strict=True)]
    assert metrics["rl/score/mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert metrics["rl/reward/mean"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert metrics["rl/length/mean"] == pytest.approx(np.mean([len(t.response_ids) for t in batch]))
    assert metrics["rl/eos_rate"] == pytest.approx(np.mean(ended))


def test_kl_is_the_sum_over_tokens_averaged_over_responses(models: tuple[Any, Any]) -> None:
    batch = trajectories(models[0])
    rng = np.random.default_rng(5)
    for t in batch:
        assert t.ref_logprobs is not None
        t.ref_logprobs = (t.ref_logprobs - rng.normal(0.1, 0.3, len(t.response_ids))).astype(np.float32)
    metrics = learner(models, config()).step(batch, 0)
    kl = np.mean([(t.generator_logprobs - t.ref_logprobs).sum() for t in batch if t.ref_logprobs is not None])
    assert metrics["rl/kl"] == pytest.approx(kl, abs=1e-4)
    assert metrics["rl/reward/mean"] == pytest.approx(metrics["rl/score/mean"] - 0.05 * kl, abs=1e-4)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_update_does_not_depend_on_micro_batches_or_order(models: tuple[Any, Any], minibatches: int) -> None:
    batch = trajectories(models[0])
    whole = with_sgd(learner(models, config(micro_batch_tokens=100_000, minibatches=minibatches)))
    pieces = with_sgd(learner(models, config(micro_batch_tokens=1, minibatches=minibatches)))
    start = weights(whole)
    whole.step(batch, 0)
    pieces.step(batch, 0)
    change = weights(whole) - start
    assert change.norm() > 0.1
    assert (weights(pieces) - start - change).norm() < 1e-5 * change.norm()


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_gradient_equals_autograd_of_the_written_out_objective(models: tuple[Any, Any], max_staleness: int) -> None:
    """The first policy gradient is that of -sum(w A log pi) / tokens with whitened GAE advantages, row by row.

    w is 1, or min(pi / pi_generator, 1.5) where another policy may have sampled.
    """
    batch = trajectories(models[0])
    rng = np.random.default_rng(1)
    shifts = [rng.normal(0.0, 0.5, len(t.response_ids)).astype(np.float32) for t in batch]
    for t, shift in zip(batch, shifts, strict=True):
        t.generator_logprobs = t.generator_logprobs - shift
    rl = with_sgd(learner(models, config(max_staleness=max_staleness, max_importance_weight=1.5)))
    before = [p.detach().clone() for p in rl.policy.model.parameters()]
    metrics = rl.step(batch, 0)
    gradient = [old - new.detach() for old, new in zip(before, rl.policy.model.parameters(), strict=True)]

    policy, value = copy.deepcopy(models)
    logprobs, advantages = [], []
    for t in batch:
        ids, p = torch.from_numpy(t.token_ids), len(t.prompt_ids)
        logits = policy(ids[None]).logits[0, p - 1 : -1] / TEMPERATURE
        logprobs.append(logits.log_softmax(-1)[torch.arange(len(ids) - p), ids[p:]])
        with torch.no_grad():
            v = value.score(value.model(ids[None]).last_hidden_state)[0, p - 1 : -1, 0].double().numpy()
        rewards = np.zeros(len(v))
        rewards[-1] = t.rewards["reward_model"] if t.finish_reason == "eos" else -1.0
        deltas = rewards + np.append(v[1:], 0.0) - v
        advantages.append([sum(0.95**k * d for k, d in enumerate(deltas[i:])) for i in range(len(v))])
    flat = np.concatenate(advantages)
    white = torch.tensor((flat - flat.mean()) / flat.std(ddof=1), dtype=torch.float32)
    ratio = np.exp(np.concatenate(shifts))
    w = torch.from_numpy(np.minimum(ratio, 1.5)) if max_staleness else torch.ones(len(flat))
    (-(w * white * torch.cat(logprobs)).sum() / len(flat)).backward()
    assert metrics["rl/importance_weight/mean"] == pytest.approx(float(w.mean()), abs=1e-5)
    assert metrics["rl/importance_weight/truncated"] == (pytest.approx((ratio > 1.5).mean()) if max_staleness else 0.0)
    assert (ratio > 1.5).any() and (ratio < 1.0).any()
    for parameter, own in zip(policy.parameters(), gradient, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-6)


def test_scores_are_clipped_before_the_penalty(models: tuple[Any, Any]) -> None:
    """Clipping is that of the scores given: the update equals that of scores which were small from the start."""
    batch = trajectories(models[0])
    wild = copy.deepcopy(batch)
    for t, raw in zip(wild, batch, strict=True):
        t.rewards = {"reward_model": 100.0 * raw.rewards["reward_model"]}
        raw.rewards = {"reward_model": float(np.clip(t.rewards["reward_model"], -0.5, 0.5))}
    clipped = with_sgd(learner(models, config(reward_clip=0.5, missing_eos_reward=-0.5)))
    small = with_sgd(learner(models, config(missing_eos_reward=-0.5)))
    metrics, expected = clipped.step(wild, 0), small.step(batch, 0)
    torch.testing.assert_close(weights(clipped), weights(small), rtol=0, atol=0)
    assert metrics["rl/reward/mean"] == expected["rl/reward/mean"]
    ended = [t for t in wild if t.finish_reason == "eos"]
    raw_scores = [t.rewards["reward_model"] if t in ended else -0.5 for t in wild]
    assert metrics["rl/score/mean"] == pytest.approx(np.mean(raw_scores), rel=1e-5)
    assert metrics["rl/score/clip_fraction"] == np.mean([abs(s) > 0.5 for s in raw_scores]) > 0.5
    assert expected["rl/score/clip_fraction"] == 0.0


def test_epochs_end_when_the_policy_has_moved_too_far(models: tuple[Any, Any]) -> None:
    """The refused update and all after it change nothing; the schedule goes on as if they had been made."""
    batch = trajectories(models[0])
    optimizer = OptimizerConfig(lr=1e-2, max_grad_norm=1e9, schedule="linear")
    two = learner(models, config(epochs=2, optimizer=optimizer))
    free = learner(models, config(epochs=4, optimizer=optimizer))
    far = two.step(batch, 0)["rl/approx_kl"]  # the mean of 0, the first epoch's, and that of the second
    kl_after_first = 2 * far
    stopped = learner(models, config(epochs=4, optimizer=optimizer, max_approx_kl=0.5 * kl_after_first))
    loose = learner(models, config(epochs=4, optimizer=optimizer, max_approx_kl=1e9))
    one = learner(models, config(epochs=4, optimizer=optimizer))
    one.config = config(epochs=1)
    metrics = stopped.step(batch, 0)
    assert metrics["rl/updates"] == 1.0
    assert metrics["rl/approx_kl"] == pytest.approx(far, rel=1e-5), "what was measured is reported"
    one.step(batch, 0)
    assert torch.equal(weights(stopped), weights(one))
    assert free.step(batch, 0)["rl/updates"] == loose.step(batch, 0)["rl/updates"] == 4.0
    assert torch.equal(weights(free), weights(loose))
    assert stopped.policy_optimizer.lr == free.policy_optimizer.lr
    assert critic_of(stopped).optimizer.lr == critic_of(free).optimizer.lr
    assert stopped.step(batch, 1)["rl/updates"] >= 1.0, "the next step begins anew"


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_before_the_update(models: tuple[Any, Any], score: float) -> None:
    rl, batch = learner(models, config()), trajectories(models[0])
    before = weights(rl)
    ended = next(t for t in batch if t.finish_reason == "eos")
    ended.rewards = {"reward_model": score}
    with pytest.raises(FloatingPointError, match="a score of the batch is not finite"):
        rl.step(batch, 0)
    assert torch.equal(weights(rl), before)


def test_spreads_are_over_responses(models: tuple[Any, Any]) -> None:
    batch = trajectories(models[0])
    rng = np.random.default_rng(5)
    for t in batch:
        assert t.ref_logprobs is not None
        t.ref_logprobs = (t.ref_logprobs - rng.normal(0.1, 0.3, len(t.response_ids))).astype(np.float32)
    metrics = learner(models, config()).step(batch, 0)
    kl = [float((t.generator_logprobs - t.ref_logprobs).sum()) for t in batch if t.ref_logprobs is not None]
    assert metrics["rl/responses"] == len(batch)
    assert metrics["rl/kl_std"] == pytest.approx(np.std(kl), rel=1e-4)
    assert metrics["rl/length/std"] == pytest.approx(np.std([len(t.response_ids) for t in batch]))


def test_critic_warmup_leaves_the_policy_alone(models: tuple[Any, Any]) -> None:
    rl = learner(models, config(critic_warmup_steps=1))
    policy = [p.detach().clone() for p in rl.policy.model.parameters()]
    value = [p.detach().clone() for p in critic_of(rl).forward.model.parameters()]
    rl.step(trajectories(models[0]), 0)
    assert all(torch.equal(a, b) for a, b in zip(policy, rl.policy.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(value, critic_of(rl).forward.model.parameters(), strict=True))
    rl.step(trajectories(models[0]), 1)
    assert any(not torch.equal(a, b) for a, b in zip(policy, rl.policy.model.parameters(), strict=True))


def test_policy_learns_to_end_early(models: tuple[Any, Any]) -> None:
    """A reward for short responses, on policy: with sampling and learning in a loop the mean length falls."""
    rl = learner(models, config(epochs=4, missing_eos_reward=None))
    generator = torch.Generator().manual_seed(0)
    lengths = []
    for step in range(12):
        batch = []
        for i in range(16):
            ids = torch.tensor([5, 6, 7])
            logprobs: list[float] = []
            while len(logprobs) < 12 and (not logprobs or ids[-1] != EOS):
                with torch.no_grad():
                    row = (rl.policy.model(ids[None]).logits[0, -1] / TEMPERATURE).log_softmax(-1)
                token = torch.multinomial(row.exp(), 1, generator=generator)
                logprobs.append(row[token].item())
                ids = torch.cat([ids, token])
            response = ids[3:].numpy()
            own = np.array(logprobs, np.float32)
            batch.append(
                Trajectory(
                    f"{i}",
                    0,
                    i,
                    np.array([5, 6, 7]),
                    response,
                    own,
                    np.zeros(len(own), np.int64),
                    "eos" if response[-1] == EOS else "length",
                    {"short": -len(own) / 4},
                    own,
                )
            )
        lengths.append(rl.step(batch, step)["rl/length/mean"])
    assert np.mean(lengths[-3:]) < 0.7 * np.mean(lengths[:3]), lengths


def test_a_failing_value_gradient_leaves_both_models_alone(models: tuple[Any, Any]) -> None:
    rl = learner(models, config())
    batch = trajectories(models[0])
    before = weights(rl)
    head = critic_of(rl).forward.model.score.weight
    head.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="nan"):
        rl.step(batch, 0)
    assert torch.equal(weights(rl), before)


def test_the_value_model_starts_with_the_reward_models_scores(models: tuple[Any, Any]) -> None:
    """Bias included: the value of the state after the last token but one is what the reward model would score."""
    value = copy.deepcopy(models[1])
    value.config.reward_bias = -0.5
    rows = [Row.completion([5, 6, 7], [8, 9, 10])]
    cut = [Row.completion([5, 6, 7], [8, 9])]
    with torch.no_grad():
        values = token_values(value, collate(rows, PAD))
        score = sequence_scores(value, collate(cut, PAD))
    torch.testing.assert_close(values[-1:], score)


def test_repeated_prompts_of_a_step_draw_other_samples() -> None:
    one, other = EncodedPrompt("a", (5, 6)), EncodedPrompt("b", (7,))
    requests = requests_for([one, other, one], 2, 0, "rl", 3)
    assert [(r.prompt_id, r.sample_index) for r in requests] == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3),
    ]  # fmt: skip
    assert len({r.seed for r in requests}) == 6
    assert requests[:2] == requests_for([one], 2, 0, "rl", 3)


def test_prompts_of_a_step_are_slices_of_permutations() -> None:
    seen = [i for step in range(5) for i in prompts_of_step(10, seed=3, step=step, per_step=4)]
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert prompts_of_step(10, 3, 2, 4) == seen[8:12]
    assert prompts_of_step(10, 4, 0, 4) != seen[:4]


def test_replacements_are_prompts_that_the_step_does_not_have() -> None:
    first = prompts_of_step(11, seed=3, step=2, per_step=4)
    others = [replacements_of_step(11, 3, 2, 4, redraw) for redraw in (1, 2, 3)]
    assert [len(each) for each in others] == [4, 3, 0]
    assert sorted([*first, *others[0], *others[1]]) == list(range(11))
    assert replacements_of_step(11, 3, 3, 4, 1) != others[0] != replacements_of_step(11, 4, 2, 4, 1)
