"""A whole PPO update against TRL 1.12: one batch of fixed samples through `PPOTrainer.train` and through ours.

All of TRL's own code runs (reward model, values, KL rewards, GAE, whitening, losses, optimiser); only its sampling is
replaced, by a table from prompt to response. Both sides start from the same random weights; reference policy, value
model and reward model differ from each other. TRL left-pads prompts of different lengths, we right-pad whole rows.

Where the conventions coincide (every response ends by length, one micro-batch) gradients and changes of both models
must agree. TRL has one optimiser for both models where we have two; its loop clips no gradient, and ours is told not
to, so that Adam, which works element by element, does the same. Three conventions differ, and each has a test that
takes TRL's numbers apart down to that difference alone:

- the score one position behind EOS: there is no action there, so lambda discounts the score once too often, through
  the value of a state in which nothing is ever chosen. Ours ends the episode at EOS, as RLlib and torchrl do.
- a penalty subtracted from the score of a response without EOS, which leaves it to a reward model that has seen only
  ended responses; ours replaces that score (Stiennon et al. 2020, Huang et al. 2024).
- means of micro-batch means: what a token weighs depends on which rows share its micro-batch; ours never does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import OPTForCausalLM, OPTForSequenceClassification
from trl.experimental.ppo import PPOConfig as TRLConfig
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from rayrlhf.algorithms.advantages import generalized_advantages, kl_penalised_rewards, whiten
from rayrlhf.algorithms.registry import make_trainer
from rayrlhf.config_rl import PPOConfig
from rayrlhf.data.rows import Row
from rayrlhf.models.batching import TokenBatch, collate
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.models.logprobs import sequence_scores, token_logprobs, token_values
from rayrlhf.models.ranks import Ranks
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Trajectory
from tests.tiny import EOS, PAD, TEMPERATURE, VOCABULARY, difference, flat, gradient, recorded_gradients, tiny_models

# TRL logs a variance over micro-batches, of which there is one.
pytestmark = pytest.mark.filterwarnings("ignore:var.*degrees of freedom")

RESPONSE_LENGTH = 6
FIXED, RAGGED = [6, 6, 6, 6, 6, 6, 6, 6], [6, 3, 5, 2, 6, 4, 1, 6]


@dataclass
class Problem:
    """Models and fixed samples."""

    policy: OPTForCausalLM
    reference: OPTForCausalLM
    value_model: OPTForSequenceClassification
    reward_model: OPTForSequenceClassification
    prompts: list[list[int]]
    responses: list[list[int]]


@dataclass
class Outcome:
    """What a learner did to its two models: each parameter's change, and its gradient at every optimiser step."""

    policy_change: Tensor
    value_change: Tensor
    policy_gradients: list[Tensor]
    value_gradients: list[Tensor]


def problem(lengths: list[int]) -> Problem:
    """`lengths[i]` tokens in response i; one that is shorter than the longest ends with EOS."""
    policy, value_model = tiny_models()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(2, 12)).tolist() for _ in lengths]
    responses = [rng.integers(3, VOCABULARY, n).tolist() for n in lengths]
    for response in responses:
        if len(response) < RESPONSE_LENGTH:
            response[-1] = EOS
    reward_model = OPTForSequenceClassification(policy.config)
    return Problem(policy, reference, value_model, reward_model, prompts, responses)


Update = Callable[..., Outcome]


@pytest.fixture
def trl_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Update:
    return partial(run_trl, tmp_path, monkeypatch)


def run_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Problem, *, micro_batches: int = 1, **changes: Any
) -> Outcome:
    """TRL's own training loop, one batch."""
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": len(given.prompts) // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "total_episodes": len(given.prompts),
        "num_ppo_epochs": 1,
        "response_length": RESPONSE_LENGTH,
        "stop_token_id": EOS,
        "temperature": TEMPERATURE,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_epsilon": 1e-5,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    tokenizer.padding_side = "left"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    policy, value_model = copy.deepcopy((given.policy, given.value_model))
    start = flat(policy.parameters()), flat(value_model.parameters())
    trainer = PPOTrainer(
        args=TRLConfig(**(arguments | changes)),
        processing_class=tokenizer,
        model=policy,
        ref_model=copy.deepcopy(given.reference),
        reward_model=copy.deepcopy(given.reward_model),
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": given.prompts}),
    )
    # Our only batch is also the dataset's last, after every part of which accelerate would otherwise take a step.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    table = {tuple(p): r for p, r in zip(given.prompts, given.responses, strict=True)}

    def fixed_samples(model: nn.Module, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        rows = [table[tuple(t for t in query.tolist() if t != PAD)] for query in queries]
        responses = torch.tensor([row + [PAD] * (RESPONSE_LENGTH - len(row)) for row in rows])
        sequences = torch.cat([queries, responses], 1)
        with torch.no_grad():
            logits = ppo_trainer.forward(model, sequences, PAD).logits[:, queries.shape[1] - 1 : -1]
        return sequences, logits / (TEMPERATURE + 1e-7)

    monkeypatch.setattr(ppo_trainer, "batch_generation", fixed_samples)
    policy_gradients, value_gradients = [], []

    def record(*_: Any) -> None:
        policy_gradients.append(gradient(policy.parameters()))
        value_gradients.append(gradient(value_model.parameters()))

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.train()
    policy_change, value_change = (flat(m.parameters()) - w for m, w in zip((policy, value_model), start, strict=True))
    return Outcome(policy_change, value_change, policy_gradients, value_gradients)


def trajectories(given: Problem) -> list[Trajectory]:
    """The same samples as our records; scores and log-probs by our own functions."""
    out = []
    for i, (prompt, response) in enumerate(zip(given.prompts, given.responses, strict=True)):
        batch = collate([Row.completion(prompt, response)], PAD)
        with torch.no_grad():
            own = token_logprobs(given.policy, batch, TEMPERATURE).numpy()
            reference = token_logprobs(given.reference, batch, TEMPERATURE).numpy()
            score = float(sequence_scores(given.reward_model, batch))
        out.append(
            Trajectory(
                str(i),
                0,
                i,
                np.array(prompt),
                np.array(response),
                own,
                np.zeros(len(response), np.int64),
                "eos" if response[-1] == EOS else "length",
                {"reward_model": score},
                reference,
            )
        )
    return out


def our_update(given: Problem, batch: list[Trajectory] | None = None, **changes: Any) -> Outcome:
    """`Trainer.step` on the same samples."""
    optimizer = OptimizerConfig(lr=1e-3, betas=(0.9, 0.999), eps=1e-5, max_grad_norm=1e9, schedule="constant")
    settings: dict[str, Any] = {
        "prompts_per_step": len(given.prompts),
        "epochs": 1,
        "temperature": TEMPERATURE,
        "missing_eos_reward": None,
    }
    config = PPOConfig(optimizer=optimizer, **(settings | changes))
    policy, value_model = copy.deepcopy((given.policy, given.value_model))
    start = flat(policy.parameters()), flat(value_model.parameters())
    forward_of = partial(Forward, pad_token_id=PAD, max_tokens=config.micro_batch_tokens, dtype="float32")
    rl = make_trainer(
        config, forward_of(policy), forward_of(value_model), Ranks(threads=1), max_response_tokens=64, seed=0
    )
    policy_gradients, value_gradients = recorded_gradients(rl)
    rl.step(batch or trajectories(given), 0)
    policy_change, value_change = (flat(m.parameters()) - w for m, w in zip((policy, value_model), start, strict=True))
    return Outcome(policy_change, value_change, policy_gradients, value_gradients)


def padded(flat_rows: Tensor, batch: TokenBatch) -> Tensor:
    """[N] to [B, R], with zeros behind each row."""
    return pad_sequence(flat_rows.split(batch.counts), batch_first=True)


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_gradients_and_weight_changes_agree(trl_update: Update, epochs: int, lam: float) -> None:
    """Four epochs at this learning rate clip about half of the tokens, so the later gradients test both losses."""
    given = problem(FIXED)
    ours, theirs = our_update(given, epochs=epochs, lam=lam), trl_update(given, num_ppo_epochs=epochs, lam=lam)
    assert len(theirs.policy_gradients) == len(ours.policy_gradients) == epochs
    for own, other in zip(ours.policy_gradients, theirs.policy_gradients, strict=True):
        assert difference(own, other) < 1e-3
    for own, other in zip(ours.value_gradients, theirs.value_gradients, strict=True):
        assert difference(own, other) < 1e-3
    assert difference(ours.policy_change, theirs.policy_change) < 1e-3
    assert difference(ours.value_change, theirs.value_change) < 1e-3

    without_kl = our_update(replace(given, reference=given.policy), epochs=epochs, lam=lam)
    assert difference(without_kl.policy_change, theirs.policy_change) > 0.1  # the comparison can fail


def test_whitened_rewards_agree(trl_update: Update) -> None:
    given = problem(FIXED)
    ours, theirs = our_update(given, whiten_rewards=True), trl_update(given, whiten_rewards=True)
    assert difference(ours.policy_change, theirs.policy_change) < 1e-3
    assert difference(ours.value_change, theirs.value_change) < 1e-3


def test_trl_scores_one_position_behind_eos(trl_update: Update) -> None:
    """With lambda 1 the step behind EOS cancels out of the advantages; with 0.95 it explains all of the difference."""
    given = problem(RAGGED)
    ours, theirs = our_update(given, lam=1.0), trl_update(given, lam=1.0)
    assert difference(ours.policy_gradients[0], theirs.policy_gradients[0]) < 1e-3
    ours, theirs = our_update(given, lam=0.95), trl_update(given, lam=0.95)
    assert difference(ours.policy_gradients[0], theirs.policy_gradients[0]) > 0.02
    assert difference(ours.value_gradients[0], theirs.value_gradients[0]) > 0.05

    # The same, written out with our functions and one step more, in which the score arrives and nothing is chosen.
    batch = trajectories(given)
    late = [[*t.response_ids, PAD] if t.finish_reason == "eos" else t.response_ids for t in batch]
    policy, value_model = copy.deepcopy((given.policy, given.value_model))
    steps = collate([Row.completion(t.prompt_ids, np.array(r)) for t, r in zip(batch, late, strict=True)], PAD)
    tokens = collate([Row.completion(t.prompt_ids, t.response_ids) for t in batch], PAD)
    values, logprobs = token_values(value_model, steps), token_logprobs(policy, tokens, TEMPERATURE)

    step_mask, mask = (padded(torch.ones(sum(b.counts), dtype=torch.bool), b) for b in (steps, tokens))
    references = torch.cat([torch.tensor(t.ref_logprobs) for t in batch])
    old, reference = padded(logprobs.detach(), tokens), padded(references, tokens)
    scores = torch.tensor([t.rewards["reward_model"] for t in batch])
    rewards = kl_penalised_rewards(scores, old, reference, step_mask, beta=0.05)
    advantages, returns = generalized_advantages(rewards, padded(values.detach(), steps), step_mask, 1.0, 0.95)
    (-(whiten(advantages, mask, lambda t: t)[mask] * logprobs).mean()).backward()
    (0.1 * 0.5 * (values - returns[step_mask]).square().mean()).backward()
    assert difference(gradient(policy.parameters()), theirs.policy_gradients[0]) < 1e-3
    assert difference(gradient(value_model.parameters()), theirs.value_gradients[0]) < 1e-3


def test_trl_subtracts_its_penalty_where_ours_replaces_the_score(trl_update: Update) -> None:
    given = problem(RAGGED)
    theirs = trl_update(given, lam=1.0, missing_eos_penalty=1.0).policy_gradients[0]
    ours = our_update(given, lam=1.0, missing_eos_reward=-1.0).policy_gradients[0]
    assert difference(ours, theirs) > 0.1

    subtracted, rescored = trajectories(given), trajectories(given)
    for trajectory, other in zip(subtracted, rescored, strict=True):
        if trajectory.finish_reason == "length":
            trajectory.rewards["reward_model"] -= 1.0
            other.rewards["reward_model"] = 100.0
    assert difference(our_update(given, subtracted, lam=1.0).policy_gradients[0], theirs) < 1e-3
    # Whatever the reward model makes of responses that never ended, it does not reach our policy.
    found = our_update(given, rescored, lam=1.0, missing_eos_reward=-1.0).policy_gradients[0]
    torch.testing.assert_close(found, ours, rtol=0, atol=0)


def test_trl_averages_micro_batch_means_where_ours_counts_every_token_once(trl_update: Update) -> None:
    """Responses of one length weigh the same either way; otherwise TRL's tokens weigh more in short responses."""
    same = problem(FIXED)
    whole = our_update(same, lam=1.0).policy_gradients[0]
    assert difference(whole, trl_update(same, lam=1.0, micro_batches=8).policy_gradients[0]) < 1e-3

    given = problem(RAGGED)
    whole = our_update(given, lam=1.0).policy_gradients[0]
    assert difference(whole, trl_update(given, lam=1.0).policy_gradients[0]) < 1e-3
    assert difference(whole, trl_update(given, lam=1.0, micro_batches=8).policy_gradients[0]) > 0.1
    assert difference(whole, our_update(given, lam=1.0, micro_batch_tokens=1).policy_gradients[0]) < 1e-5
