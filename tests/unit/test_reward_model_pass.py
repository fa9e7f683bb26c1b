"""The reward model's pass over ranked answers: against a loop over transformers, micro-batch sizes and two ranks."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import logsigmoid

from rayrlhf.algorithms.preferences import LabelledKTO
from rayrlhf.algorithms.ranked_pass import answer_logprobs, ranked_pass, rows_of, score_rows, summary
from rayrlhf.algorithms.ranking import Measured
from rayrlhf.config_dpo import KTOConfig
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.labelled import LabelledAnswers
from rayrlhf.data.rows import Row
from rayrlhf.models.loading import load_policy, load_reward_model, resolve_model
from rayrlhf.models.ranks import Ranks
from tests.tiny import forward_of

TINY = resolve_model("embedded:opt-tiny")
PAD, EOS = 1, 2


def comparisons_of(count: int, seed: int) -> list[RankedAnswers]:
    """Two to four random answers of mixed lengths to random prompts."""
    generator = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in generator.integers(3, 8000, generator.integers(low, high)))

    made = []
    for i in range(count):
        answers = tuple((*tokens(2, 20), EOS) for _ in range(generator.integers(2, 5)))
        names = tuple(map(str, range(len(answers))))
        made.append(RankedAnswers(str(i), "", (EOS, *tokens(3, 30)), names, answers, None, "toy"))
    return made


def labelled_of(comparisons: list[RankedAnswers]) -> list[LabelledAnswers]:
    """The same answers, every third of them a good one."""
    made = []
    for i, c in enumerate(comparisons):
        labels = tuple((i + k) % 3 == 0 for k in range(len(c.response_ids)))
        made.append(LabelledAnswers(c.id, c.prompt_ids, c.response_ids, labels))
    return made


def references(count: int = 12) -> list[Row]:
    return [Row.completion(c.prompt_ids, c.response_ids[0]) for c in comparisons_of(count, seed=99)]


def test_the_loss_is_the_papers_and_its_gradient_does_not_depend_on_the_cut() -> None:
    weights = [1.0, 1.0, 1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 0.5]  # some are of earlier rounds
    comparisons = [replace(c, weight=w) for c, w in zip(comparisons_of(9, seed=3), weights, strict=True)]
    model = load_reward_model(TINY, fresh_head_seed=0)

    def by_hand() -> torch.Tensor:
        losses = []
        for c in comparisons:
            scores = [model(input_ids=torch.tensor([[*c.prompt_ids, *a]])).logits[0, 0] for a in c.response_ids]
            losses.append(-torch.stack([logsigmoid(scores[b] - scores[w]) for b, w in c.pairs]).mean())
        return (torch.stack(losses) * torch.tensor(weights)).sum() / sum(weights)

    expected = by_hand()
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for micro_batch_tokens in (1, 150, 100_000):
        model.zero_grad(set_to_none=True)
        found = ranked_pass(forward_of(model, micro_batch_tokens), comparisons, Ranks(1), scale=1 / sum(weights))
        ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert found.loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert float((ours - gradient).norm() / gradient.norm()) < 1e-5


def _two_ranks(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    _one_rank(f"{out}-{rank}")
    dist.destroy_process_group()


def _one_rank(out: str) -> None:
    """Loss, margins, scores and the gradient summed over ranks, as this rank sees them; also those of labelled answers.

    KTO's reference is up to 3 nats an answer from the policy, so that scores lie on both sides of the zero point.
    """
    ranks, comparisons = Ranks(1), comparisons_of(7, seed=4)
    model = load_reward_model(TINY, fresh_head_seed=0)
    forward = forward_of(model, 200)
    found = ranked_pass(forward, comparisons, ranks, scale=1 / len(comparisons))
    ranks.sum_gradients(list(model.parameters()))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    scores = torch.from_numpy(score_rows(forward, references(5), ranks))
    policy, labelled, kto = load_policy(TINY), labelled_of(comparisons), LabelledKTO(KTOConfig())
    logprobs = torch.from_numpy(answer_logprobs(forward_of(policy, 200), references(5), ranks))
    kto.prepare(np.full(7, 2.0), np.zeros(7))
    flat = answer_logprobs(forward_of(policy, 200), [row for c in labelled for row in rows_of(c)], ranks)
    shifted = np.split(flat + 3.0 * np.sin(np.arange(len(flat))), np.cumsum([c.examples for c in labelled])[:-1])
    answers = sum(c.examples for c in labelled)
    own = ranked_pass(forward_of(policy, 200), labelled, ranks, 1 / answers, kto, shifted)
    ranks.sum_gradients(list(policy.parameters()))
    kto_gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    found_here = {
        "margins": torch.cat([found.margins, own.margins, own.better, own.worse]), "gradient": gradient,
        "kto_gradient": kto_gradient, "scores": scores, "logprobs": logprobs, "loss": found.loss, "kto_loss": own.loss,
    }  # fmt: skip
    torch.save(found_here, out)


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_two_ranks, args=(port, str(tmp_path / "two")), nprocs=2)
    _one_rank(str(tmp_path / "one"))
    one = torch.load(tmp_path / "one", weights_only=True)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two-{rank}", weights_only=True)
        assert [two["loss"], two["kto_loss"]] == pytest.approx([one["loss"], one["kto_loss"]], rel=1e-5)
        torch.testing.assert_close(two["margins"], one["margins"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two["scores"], one["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two["logprobs"], one["logprobs"], rtol=1e-5, atol=1e-4)
        for name in ("gradient", "kto_gradient"):
            assert float((two[name] - one[name]).norm() / one[name].norm()) < 1e-5


@pytest.mark.parametrize("micro_batch_tokens", [1, 150])
def test_answer_logprobs_are_transformers_own(micro_batch_tokens: int) -> None:
    model, comparisons = load_policy(TINY), comparisons_of(3, seed=5)
    rows = [row for c in comparisons for row in rows_of(c)]
    ours = answer_logprobs(forward_of(model, micro_batch_tokens), rows, Ranks(1))
    expected = []
    for c in comparisons:
        for answer in c.response_ids:
            ids = torch.tensor([[*c.prompt_ids, *answer]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(c.prompt_ids), ids.shape[1])
            expected.append(sum(float(logprobs[t - 1, ids[0, t]]) for t in places))
    assert ours == pytest.approx(expected, rel=1e-5)


def test_summary_by_source_and_confidence() -> None:
    margins = torch.tensor([2.0, -1.0, 0.1, 3.0])
    found = summary(Measured(0.4, margins, margins, -margins, ["a", "a", "b", "b"]))
    assert found["reward_model/heldout_accuracy"] == 0.75
    assert (found["reward_model/source/a/accuracy"], found["reward_model/source/b/accuracy"]) == (0.5, 1.0)
    assert (
        found["reward_model/confidence/0.8-0.9/accuracy"] == 1.0
        and found["reward_model/confidence/0.7-0.8/accuracy"] == 0.0
    )
    assert found["reward_model/confidence/0.9-1/pairs"] == 1 and "reward_model/confidence/0.6-0.7/accuracy" not in found
    assert found["reward_model/margin_from/2"] == 2 and found["reward_model/margin_from/-1"] == 1
