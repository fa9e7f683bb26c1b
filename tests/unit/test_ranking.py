"""The ranking loss and its measures against naive loops in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import logsigmoid

from rayrlhf.algorithms.ranking import (
    CONFIDENCE_EDGES,
    MARGIN_EDGES,
    accuracy_by_confidence,
    flatten_pairs,
    margin_histogram,
    ranking_accuracy,
    ranking_loss,
)

PAIRS = [[(0, 1), (0, 2), (1, 2)], [(0, 1)], [(2, 0), (3, 1)]]
ANSWERS = [3, 2, 4]


def naive_loss(scores: list[list[float]]) -> float:
    """InstructGPT's equation 1, one prompt after the other."""
    total = 0.0
    for own, pairs in zip(scores, PAIRS, strict=True):
        losses = [math.log1p(math.exp(-(own[better] - own[worse]))) for better, worse in pairs]
        total += sum(losses) / len(losses)
    return total


def test_loss_equals_a_naive_loop_and_counts_each_prompt_once() -> None:
    scores = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    pairs, weights = flatten_pairs(PAIRS, ANSWERS)
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [7, 5], [8, 6]]
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 0.5, 0.5])
    found = ranking_loss(scores, pairs, weights.double())
    split = [part.tolist() for part in scores.split(ANSWERS)]
    # The weights are float32 thirds.
    assert float(found.loss) == pytest.approx(naive_loss(split), rel=1e-7)
    assert found.margins.tolist() == pytest.approx([float(scores[b] - scores[w]) for b, w in pairs.tolist()])


def test_weighted_prompts_equal_a_naive_loop() -> None:
    """As the comparisons of earlier rounds are."""
    scores = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own_weights = [1.0, 0.5, 0.25]
    pairs, weights = flatten_pairs(PAIRS, ANSWERS, own_weights)
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.5, 0.125, 0.125])
    expected = 0.0
    for own, ranked, weight in zip(scores.split(ANSWERS), PAIRS, own_weights, strict=True):
        losses = [math.log1p(math.exp(-float(own[better] - own[worse]))) for better, worse in ranked]
        expected += weight * sum(losses) / len(losses)
    assert float(ranking_loss(scores, pairs, weights.double()).loss) == pytest.approx(expected, rel=1e-7)


def test_loss_of_one_pair_is_logsigmoid_with_its_gradient() -> None:
    scores = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[0, 1]]), torch.ones(1)).loss
    assert float(loss.detach()) == pytest.approx(-float(logsigmoid(torch.tensor(1.5, dtype=torch.float64))))
    loss.backward()
    assert scores.grad is not None
    share = 1 / (1 + math.exp(1.5))
    assert scores.grad.tolist() == pytest.approx([-share, share])


def test_loss_is_finite_where_exp_overflows() -> None:
    scores = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[0, 1]]), torch.ones(1)).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1000.0)
    assert scores.grad is not None and scores.grad.tolist() == [-1.0, 1.0]


def test_no_pairs_give_no_loss() -> None:
    pairs, weights = flatten_pairs([[], []], [2, 3])
    assert pairs.shape == (0, 2)
    assert float(ranking_loss(torch.randn(5), pairs, weights).loss) == 0.0


def test_accuracy_counts_ties_half() -> None:
    assert ranking_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)
    assert math.isnan(ranking_accuracy(torch.tensor([])))


def test_accuracy_by_confidence_equals_a_naive_count() -> None:
    margins = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.3
    margins[0], margins[1] = 60.0, 0.0  # confidence exactly 1 and exactly 0.5
    bins = accuracy_by_confidence(margins)
    assert [(b.low, b.high) for b in bins] == list(pairwise(CONFIDENCE_EDGES))
    for part in bins:
        inside = []
        for margin in margins.tolist():
            confidence = 1 / (1 + math.exp(-abs(margin)))
            if part.low <= confidence < part.high or confidence == part.high == 1.0:
                inside.append(0.5 if margin == 0 else float(margin > 0))
        assert part.pairs == len(inside) > 0
        assert part.accuracy == pytest.approx(sum(inside) / len(inside))
    assert sum(part.pairs for part in bins) == 500


def test_margin_histogram_covers_everything() -> None:
    margins = torch.tensor([-9.0, -4.0, -0.1, 0.0, 0.49, 0.5, 4.0, 100.0])
    counts = margin_histogram(margins)
    assert len(counts) == len(MARGIN_EDGES) + 1
    assert counts == [1, 1, 0, 0, 1, 2, 1, 0, 0, 2]
