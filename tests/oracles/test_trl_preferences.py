"""DPO, cDPO, IPO, KTO and SimPO against TRL 1.12: losses, scores, and gradients of all weights.

TRL's own loss runs in a real `DPOTrainer` or `KTOTrainer`, on rectangles that are padded on the right, one prompt after
the other; ours runs on packed rows that share prompts, all at once and cut into micro-batches. TRL's SimPO is a method
of its `CPOTrainer` that reads five settings, and gets log-probs from transformers.

TRL measures KTO's KL on each example's prompt with another example's completion. It is given our rows for that.
KTO is compared over pairs, and over single answers with a label, as many a prompt as there happen to be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import OPTForCausalLM
from trl import DPOConfig as TRLDPOConfig
from trl import DPOTrainer, KTOTrainer
from trl import KTOConfig as TRLKTOConfig
from trl.experimental.cpo import CPOTrainer

from rayrlhf.algorithms.preferences import make_preference_loss, mismatched
from rayrlhf.algorithms.ranked_pass import answer_logprobs, ranked_pass, rows_of
from rayrlhf.config_dpo import DPOConfig, DPOSection, IPOConfig, KTOConfig, SimPOConfig
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.labelled import LabelledAnswers
from rayrlhf.data.rows import Row
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.models.ranks import Ranks
from tests.tiny import EOS, PAD, VOCABULARY, difference, forward_of, gradient, tiny_models

ONE_EACH, ALL = 1, 4096  # limits of a micro-batch
ANSWERS = ((3, 14), (6, 1, 9), (2, 20), (5, 4, 11, 7))
"""tokens of the answers to each prompt, best first"""
LABELS = ((True, False), (True,), (False, False, True), (False,), (True, True))
"""of the answers to each prompt, where there are labels: five good ones and four bad ones"""


class Problem(NamedTuple):
    policy: OPTForCausalLM
    reference: OPTForCausalLM
    comparisons: list[Any]
    """ranked or labelled answers"""


class Found(NamedTuple):
    loss: float
    gradient: Tensor
    better: Sequence[float]
    """score of the better answer of every pair, or of the good answers"""
    worse: Sequence[float]
    details: Mapping[str, float] = MappingProxyType({})


def problem(answers: Sequence[Sequence[int]] = ANSWERS, seed: int = 1) -> Problem:
    reference, _ = tiny_models()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCABULARY, n).tolist())

    comparisons: list[Any] = []
    for i, own in enumerate(answers):
        prompt, responses = tokens(3 + i), tuple((*tokens(n - 1), EOS) for n in own)
        comparisons.append(RankedAnswers(str(i), "", prompt, tuple(map(str, own)), responses, None, ""))
    return Problem(policy, reference, comparisons)


def labelled_problem(labels: Sequence[tuple[bool, ...]]) -> Problem:
    """As many answers to each prompt as it has labels; the seed is one whose KL estimates are above 0."""
    given = problem([[3 + 4 * k + i for k in range(len(own))] for i, own in enumerate(labels)], seed=8)
    made = [
        LabelledAnswers(c.id, c.prompt_ids, c.response_ids, own)
        for c, own in zip(given.comparisons, labels, strict=True)
    ]
    return given._replace(comparisons=made)


def ours(given: Problem, config: DPOSection, micro_batch_tokens: int = ALL) -> Found:
    labelled = any(c.labelled for c in given.comparisons)
    policy, loss, ranks = copy.deepcopy(given.policy), make_preference_loss(config, labelled), Ranks(1)
    forward, frozen = forward_of(policy, micro_batch_tokens), forward_of(given.reference)
    references = [answer_logprobs(frozen, rows_of(c), ranks) for c in given.comparisons]
    if others := loss.extra_rows(given.comparisons):
        loss.prepare(answer_logprobs(forward, others, ranks), answer_logprobs(frozen, others, ranks))
    known = references if config.reference else None
    examples = sum(c.examples for c in given.comparisons)
    found = ranked_pass(forward, given.comparisons, ranks, 1 / examples, loss, known)
    sides = found.better.tolist(), found.worse.tolist()
    return Found(found.loss, gradient(policy.parameters()), *sides, loss.details(found))


def rectangle(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """[n, T] ids, attention mask and mask of the answers."""
    longest = max(len(row.ids) for row in rows)
    ids, attention, answer = (torch.full((len(rows), longest), fill) for fill in (PAD, 0, 0))
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], attention[i, :n], answer[i, :n] = torch.tensor(row.ids), 1, torch.tensor(row.mask).long()
    return ids, attention, answer


def trainer_of(kind: Callable[..., Any], config: Callable[..., Any], given: Problem, path: Path, **changes: Any) -> Any:
    """A real trainer, on rows that its preparation accepts and that nobody reads."""
    text = {"prompt": ["one", "two"], "completion": ["a", "b"], "label": [True, False]}
    if kind is DPOTrainer:
        text = {"prompt": ["one", "two"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    arguments = config(output_dir=str(path), bf16=False, use_cpu=True, report_to=[], **changes)
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    model, reference = copy.deepcopy(given.policy), copy.deepcopy(given.reference)
    return kind(model, reference, args=arguments, train_dataset=Dataset.from_dict(text), processing_class=tokenizer)


def trl_dpo(given: Problem, path: Path, **changes: Any) -> Found:
    trainer = trainer_of(DPOTrainer, TRLDPOConfig, given, path, **changes)
    total, better, worse = 0.0, [], []
    for c in given.comparisons:
        rows = rows_of(c)
        ids, attention, answer = rectangle([rows[i] for side in (0, 1) for i in (pair[side] for pair in c.pairs)])
        batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": answer}
        loss = trainer._compute_loss(trainer.model, batch, False) / len(given.comparisons)
        loss.backward()
        total += loss.item()
        better.append(trainer._metrics["train"]["rewards/chosen"][-1])
        worse.append(trainer._metrics["train"]["rewards/rejected"][-1])
    return Found(total, gradient(trainer.model.parameters()), better, worse)


def trl_kto(given: Problem, path: Path, labels: Sequence[bool], **changes: Any) -> Found:
    """`labels` are of all answers, one prompt after the other."""
    trainer = trainer_of(KTOTrainer, TRLKTOConfig, given, path, **changes)
    rows = [row for c in given.comparisons for row in rows_of(c)]
    ids, attention, answer = rectangle(rows)
    kl_ids, kl_attention, kl_answer = rectangle(mismatched(given.comparisons))
    batch = {
        "input_ids": ids, "attention_mask": attention, "completion_mask": answer,
        "KL_input_ids": kl_ids, "KL_attention_mask": kl_attention, "KL_completion_mask": kl_answer,
        "label": torch.tensor(labels),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    assert trainer._metrics["train"]["kl"][0] > 0.0, "a KL of 0 would hide its part of the loss"
    metrics = trainer._metrics["train"]
    means = [metrics.get(f"rewards/{side}", []) for side in ("chosen", "rejected")]
    details = {name: values[0] for name, values in metrics.items() if isinstance(values, list)}
    return Found(loss.item(), gradient(trainer.model.parameters()), means[0], means[1], details)


def trl_simpo(given: Problem, beta: float, gamma: float) -> Found:
    policy = copy.deepcopy(given.policy)
    settings = SimpleNamespace(
        alpha=0.0, beta=beta, simpo_gamma=gamma, loss_type="simpo", label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    total, better, worse = torch.zeros(()), [], []
    for c in given.comparisons:
        means = []
        for row in rows_of(c):
            logprobs = policy(torch.tensor(row.ids)[None]).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(row.ids)[1:, None])[:, 0]
            means.append(own[torch.tensor(row.mask[1:])].mean())
        sides = [torch.stack([means[pair[side]] for pair in c.pairs]) for side in (0, 1)]
        losses, chosen, rejected = CPOTrainer.cpo_loss(settings, *sides)
        total = total + losses.mean() / len(given.comparisons)
        better += chosen.tolist()
        worse += rejected.tolist()
    total.backward()
    return Found(total.item(), gradient(policy.parameters()), better, worse)


def same(found: Found, expected: Found) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=2e-5)
    assert difference(found.gradient, expected.gradient) < 5e-5


def by_prompt(values: Sequence[float], given: Problem) -> list[float]:
    """Means over the pairs of each prompt, as `trl_dpo` has them."""
    parts = np.split(np.array(values), np.cumsum([len(c.pairs) for c in given.comparisons])[:-1])
    return [float(part.mean()) for part in parts]


@pytest.mark.parametrize("micro_batch_tokens", [ONE_EACH, ALL])
def test_dpo(micro_batch_tokens: int, tmp_path: Path) -> None:
    given = problem()
    found, expected = ours(given, DPOConfig(beta=0.3), micro_batch_tokens), trl_dpo(given, tmp_path, beta=0.3)
    same(found, expected)
    assert by_prompt(found.better, given) == pytest.approx(expected.better, rel=1e-4)
    assert by_prompt(found.worse, given) == pytest.approx(expected.worse, rel=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [ONE_EACH, ALL])
def test_ipo(micro_batch_tokens: int, tmp_path: Path) -> None:
    given = problem()
    same(ours(given, IPOConfig(beta=0.3), micro_batch_tokens), trl_dpo(given, tmp_path, beta=0.3, loss_type=["ipo"]))


def test_conservative_dpo() -> None:
    """TRL has it in `CPOTrainer`, which gets log ratios here. The gradient is that of pairs and of mirrored pairs."""
    given, e = problem(), 0.2
    found = ours(given, DPOConfig(beta=0.3, label_smoothing=e))
    settings = SimpleNamespace(
        alpha=0.0, beta=1.0, loss_type="sigmoid", label_smoothing=e, accelerator=SimpleNamespace(device="cpu")
    )
    losses, _, _ = CPOTrainer.cpo_loss(settings, torch.tensor(found.better), torch.tensor(found.worse))
    assert found.loss == pytest.approx(np.mean(by_prompt(losses.tolist(), given)), rel=2e-5)
    mirrored = [
        RankedAnswers(c.id, c.prompt, c.prompt_ids, c.responses[::-1], c.response_ids[::-1], None, "")
        for c in given.comparisons
    ]
    plain = DPOConfig(beta=0.3)
    right, wrong = ours(given, plain), ours(given._replace(comparisons=mirrored), plain)
    assert difference(found.gradient, (1 - e) * right.gradient + e * wrong.gradient) < 5e-5


@pytest.mark.parametrize("micro_batch_tokens", [ONE_EACH, ALL])
def test_kto(micro_batch_tokens: int, tmp_path: Path) -> None:
    given = problem(((3, 14), (6, 1), (2, 20), (5, 4)))
    config = KTOConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    changes = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    found = ours(given, config, micro_batch_tokens)
    expected = trl_kto(given, tmp_path, [True, False] * len(given.comparisons), **changes)
    same(found, expected)
    assert np.mean(found.better) == pytest.approx(expected.better[0], rel=1e-4)
    assert np.mean(found.worse) == pytest.approx(expected.worse[0], rel=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [ONE_EACH, ALL])
@pytest.mark.parametrize("labels", [LABELS, [(True, True), (True,), (True,)], [(False,), (False, False)]])
def test_kto_over_labelled_answers(labels: Sequence[tuple[bool, ...]], micro_batch_tokens: int, tmp_path: Path) -> None:
    """Every answer has the same weight, whatever the number of answers to its prompt; one side alone will do."""
    given = labelled_problem(labels)
    changes = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    found = ours(given, KTOConfig.model_validate(changes), micro_batch_tokens)
    expected = trl_kto(given, tmp_path, [label for own in labels for label in own], **changes)
    same(found, expected)
    assert found.details["kl"] == pytest.approx(expected.details["kl"], rel=1e-4)
    for side, scores, mean in (("chosen", found.better, expected.better), ("rejected", found.worse, expected.worse)):
        assert ([np.mean(scores)] if scores else []) == pytest.approx(mean, rel=1e-4)
        assert ([found.details[f"reward/{side}"]] if scores else []) == pytest.approx(mean, rel=1e-4)
    if expected.better and expected.worse:
        assert found.details["margin"] == pytest.approx(expected.details["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [ONE_EACH, ALL])
def test_simpo(micro_batch_tokens: int) -> None:
    given = problem()
    found = ours(given, SimPOConfig(beta=2.0, target_margin=0.8), micro_batch_tokens)
    expected = trl_simpo(given, 2.0, 0.8)
    same(found, expected)
    assert found.better == pytest.approx(expected.better, rel=1e-4)
    assert found.worse == pytest.approx(expected.worse, rel=1e-4)


def test_wrong_versions_are_told_apart(tmp_path: Path) -> None:
    """Sums in place of IPO's means (torchtune #1291), and another beta."""
    given = problem()
    expected = trl_dpo(given, tmp_path, beta=0.3, loss_type=["ipo"])
    assert abs(ours(given, DPOConfig(beta=0.3)).loss - expected.loss) > 0.1
    assert difference(ours(given, IPOConfig(beta=0.31)).gradient, expected.gradient) > 1e-3
