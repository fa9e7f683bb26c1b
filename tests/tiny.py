"""Tiny random models, and trajectories for them, that several tests share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rayrlhf.algorithms.critic import Critic
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.algorithms.registry import make_trainer
from rayrlhf.algorithms.trainer import Trainer
from rayrlhf.config_rl import RLConfig
from rayrlhf.models.forward import Forward
from rayrlhf.models.ranks import Ranks
from rayrlhf.trajectory import FinishReason, Trajectory

EOS, PAD, VOCABULARY, TEMPERATURE, MAX_RESPONSE = 2, 1, 50, 0.7, 20


def tiny_config(hidden: int = 32) -> OPTConfig:
    """Two layers, weights large enough for every token to matter."""
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        ffn_dim=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=hidden,
        dropout=0.0,
        num_labels=1,
        init_std=0.2,
        pad_token_id=PAD,
    )


def tiny_models(hidden: int = 32, seed: int = 0) -> tuple[OPTForCausalLM, OPTForSequenceClassification]:
    """A random policy and a random model with a scalar head."""
    torch.set_num_threads(1)  # more would only wait for each other
    torch.manual_seed(seed)
    return OPTForCausalLM(tiny_config(hidden)), OPTForSequenceClassification(tiny_config(hidden))


def random_trajectories(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Trajectory]:
    """One per (prompt tokens, response tokens), with random scores and log-probs; two in three end with EOS."""
    rng = np.random.default_rng(seed)
    made = []
    for i, (prompt_length, response_length) in enumerate(lengths):
        prompt, response = (rng.integers(3, VOCABULARY, n) for n in (prompt_length, response_length))
        if i % 3:
            response[-1] = EOS
        logprobs = rng.normal(-4.0, 0.5, (2, response_length)).astype(np.float32)
        made.append(
            Trajectory(
                f"p{i}",
                0,
                i,
                prompt,
                response,
                logprobs[0],
                np.zeros(response_length, np.int64),
                "eos" if i % 3 else "length",
                {"reward": float(rng.normal())},
                logprobs[1],
            )
        )
    return made


def sample_of(policy: Any, prompt: str, index: int, generator: torch.Generator) -> Trajectory:
    """A response of six tokens that the policy samples; the more often 5 stands in it, the better it is."""
    ids, logprobs = torch.tensor([7, 8, int(prompt[1:]) + 10]), []
    for _ in range(6):
        with torch.no_grad():
            row = policy(ids[None]).logits[0, -1].log_softmax(-1)
        token = torch.multinomial(row.exp(), 1, generator=generator)
        logprobs.append(row[token].item())
        ids = torch.cat([ids, token])
    own, response = np.array(logprobs, np.float32), ids[3:].numpy()
    reason: FinishReason = "eos" if response[-1] == EOS else "length"
    score = {"fives": float((response == 5).sum())}
    return Trajectory(prompt, index, 0, ids[:3].numpy(), response, own, np.zeros(6, np.int64), reason, score, own)


def forward_of(model: Any, max_tokens: int = 4096) -> Forward:
    return Forward(model, pad_token_id=PAD, max_tokens=max_tokens, dtype="float32")


def trainer_of(
    policy: Any,
    value_model: Any,
    config: RLConfig,
    ranks: Ranks | None = None,
    seed: int = 0,
    normalized: Mapping[str, float] | None = None,
) -> Trainer:
    """A trainer of these models in float32, with micro-batches as the config says."""
    forwards = [forward_of(model, config.micro_batch_tokens) if model else None for model in (policy, value_model)]
    assert forwards[0]
    return make_trainer(
        config, forwards[0], forwards[1], ranks or Ranks(1), max_response_tokens=MAX_RESPONSE, seed=seed,
        normalized=normalized,
    )  # fmt: skip


def critic_of(trainer: Trainer) -> Critic:
    """The critic of an algorithm that has one."""
    assert trainer.critic
    return trainer.critic


def optimizers(trainer: Trainer) -> list[Optimizer]:
    """Of the policy, and of the critic if there is one."""
    return [trainer.policy_optimizer, *([trainer.critic.optimizer] if trainer.critic else [])]


def with_sgd(rl: Trainer, lr: float = 1.0) -> Trainer:
    """Plain gradient descent shows the gradient itself; Adam would blow rounding up to the size of a step."""
    for optimizer in optimizers(rl):
        optimizer.adamw = torch.optim.SGD(optimizer.parameters, lr=lr)  # type: ignore[assignment]
        optimizer.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda step: 1.0)
    return rl


def flat(parameters: Iterable[nn.Parameter]) -> Tensor:
    """[parameters] a copy of all weights in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """[parameters] a copy of all gradients in one vector, zero where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone() for p in parameters])


def recorded_gradients(rl: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists that `rl` fills with the policy's and the value model's gradients, as its optimisers use them."""
    records: tuple[list[Tensor], list[Tensor]] = ([], [])
    for optimizer, record in zip(optimizers(rl), records, strict=False):
        optimizer.adamw.register_step_pre_hook(
            lambda *_, own=optimizer.parameters, into=record: into.append(gradient(own))
        )
    return records


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, relative to theirs."""
    return float((ours - theirs).norm() / theirs.norm())
