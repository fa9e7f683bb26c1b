"""Two learner ranks over gloo end with the weights of one: sharding changes who computes, not what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rayrlhf.config import OptimizerConfig, PPOConfig
from rayrlhf.distributed import Ranks
from rayrlhf.ppo import PPO
from rayrlhf.trajectory import Trajectory

VOCABULARY, EOS, PAD = 50, 2, 1


def make_ppo(ranks: Ranks, samples: int) -> PPO:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    model = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=64, dropout=0.0, **size)
    model.init_std, model.num_labels = 0.2, 1
    # A large eps keeps Adam from blowing rounding errors of tiny gradients up to the size of a step.
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-2)
    config = PPOConfig(
        prompts_per_step=samples, steps=2, epochs=2, minibatches=2, micro_batch_tokens=40, optimizer=optimizer
    )
    policy, value = OPTForCausalLM(model), OPTForSequenceClassification(model)
    return PPO(policy.eval(), value.eval(), config, ranks, pad_token_id=PAD, dtype="float32", seed=0)


def trajectories(count: int) -> list[Trajectory]:
    """Of mixed lengths, so that the ranks' shares of tokens, and of each mini-batch, differ."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        prompt, response = (rng.integers(3, VOCABULARY, rng.integers(2, high)) for high in (12, 20))
        if i % 3:
            response[-1] = EOS
        logprobs = rng.normal(-4.0, 0.5, (2, len(response))).astype(np.float32)
        made.append(
            Trajectory(
                f"p{i}", 0, i, prompt, response, logprobs[0], np.zeros(len(response), np.int64),
                "eos" if i % 3 else "length", {"reward": float(rng.normal())}, logprobs[1],
            )
        )  # fmt: skip
    return made


def two_steps(ranks: Ranks, count: int) -> tuple[torch.Tensor, list[dict[str, float]]]:
    ppo = make_ppo(ranks, count)
    metrics = [ppo.step(trajectories(count), step) for step in range(2)]
    models = (ppo.policy, ppo.value_model)
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()]), metrics


def work(rank: int, directory: str, count: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    torch.save(two_steps(Ranks(threads=1), count), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [9, 3])
def test_two_ranks_end_with_the_weights_of_one(tmp_path: Path, count: int) -> None:
    """With 3 samples in 2 mini-batches, some rank has none of a mini-batch, and must still take part."""
    mp.spawn(work, args=(str(tmp_path), count), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    alone, metrics = two_steps(Ranks(threads=1), count)
    results: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    start = make_ppo(Ranks(threads=1), count)
    before = torch.cat([p.detach().flatten() for m in (start.policy, start.value_model) for p in m.parameters()])
    assert (alone - before).norm() > 1e-2 * before.norm()
    for weights, theirs in results:
        assert (weights - alone).norm() < 1e-5 * (alone - before).norm()
        for ours, expected in zip(theirs, metrics, strict=True):
            assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.equal(results[0][0], results[1][0])
