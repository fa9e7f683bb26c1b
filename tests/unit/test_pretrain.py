"""scripts/pretrain: what a post becomes, windows, schedule, and a run that goes on as if nothing had stopped it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from rayrlhf.models.loading import context_length, load_tokenizer
from scripts.pretrain import attention
from scripts.pretrain.__main__ import make_model, parse
from scripts.pretrain.corpus import EOS, IGNORED, Corpus
from scripts.pretrain.schedule import Budget, Position
from scripts.pretrain.titles import LONGEST_POST, comparisons, prompt_of
from scripts.pretrain.tokens import kept, render, texts
from scripts.pretrain.trainer import Trainer

FOREVER = Budget("tokens", math.inf, 0.25)


def corpus_of(*lengths: int) -> Corpus:
    """Posts of these lengths whose tokens are 10, 11, 12 and so on, through all of them."""
    starts = np.cumsum([0, *lengths])
    return Corpus(np.arange(10, 10 + starts[-1]).astype(np.uint16), starts)


def test_a_post_has_its_title_before_or_after_it() -> None:
    row = {"subreddit": "tea", "title": "Green", "post": "Or black?"}
    assert render(row, title_last=False) == "SUBREDDIT: r/tea\n\nTITLE: Green\n\nPOST: Or black?"
    assert render(row, title_last=True) == "SUBREDDIT: r/tea\n\nPOST: Or black?\n\nTITLE: Green"
    found = list(texts([row] * 1000, 0.35, seed=0))
    assert 300 < found.count(render(row, True)) < 400 and found.count(render(row, False)) > 600
    assert found == list(texts([row] * 1000, 0.35, seed=0)) and found != list(texts([row] * 1000, 0.35, seed=1))


def test_posts_of_the_evaluation_are_left_out_under_any_id() -> None:
    long = " ".join(f"word{i}" for i in range(40))
    known = [{"id": "a", "post": f"{long} as it was without its TL;DR"}]
    rows = [
        {"id": "a", "post": "the same id"},
        {"id": "b", "post": f"{long.upper()}  as it was with its TL;DR"},  # a crosspost
        {"id": "c", "post": "another post"},
        {"id": "d", "post": "Another  post"},
        {"id": "c", "post": "a third post"},
    ]
    found, left = kept(rows, known)
    assert [row["post"] for row in found] == ["another post"]
    assert left == {"of the TL;DR data": 2, "repeats": 2}


def test_a_posts_own_title_is_better_than_those_of_other_posts() -> None:
    rows = [{"id": str(i), "subreddit": "tea", "title": f"Title {i}", "post": f"Post {i}"} for i in range(50)]
    rows += [{**rows[3], "id": "again", "post": "another post of that title"}]
    found = list(comparisons(rows, 3, seed=0))
    for row, each in zip(rows, found, strict=True):
        own, *others = each["responses"]
        assert (each["id"], each["prompt"], own) == (row["id"], prompt_of(row), row["title"])
        assert each["scores"] == [1.0, 0.0, 0.0, 0.0] and len({own, *others}) == 4
        assert set(others) <= {row["title"] for row in rows}
    # 153 draws of 50 titles: only a few are never drawn.
    assert len({title for each in found for title in each["responses"][1:]}) > 35
    assert found == list(comparisons(rows, 3, seed=0)) and found != list(comparisons(rows, 3, seed=1))
    # With four titles, the three others are the rest.
    assert all(len(set(each["responses"])) == 4 for each in comparisons(rows[:4], 3, seed=0))


def test_a_long_post_is_cut_between_words_and_shows_no_title() -> None:
    row = {"subreddit": "tea", "title": "Green", "post": "leaf " * 200}
    body = prompt_of(row).removeprefix("SUBREDDIT: r/tea\n\nPOST: ").removesuffix("\n\nTL;DR:")
    assert set(body.split()) == {"leaf"} and LONGEST_POST - 10 < len(body) <= LONGEST_POST
    assert prompt_of({**row, "post": "Or black?"}) == "SUBREDDIT: r/tea\n\nPOST: Or black?\n\nTL;DR:"


def test_windows_hold_every_token_once_and_cut_only_what_is_too_long() -> None:
    # With an EOS before each, the sizes are 4, 6, 9 + 2 (9 tokens are cut after 8) and 3; a window has room for 9.
    windows = corpus_of(3, 5, 9, 2).windows(8, "seed")
    posts = {(0, 3): "3", (3, 8): "5", (8, 16): "8 of 9", (16, 17): "1 of 9", (17, 19): "2"}
    assert {frozenset(posts[piece] for piece in window) for window in windows} == {
        frozenset({"8 of 9"}), frozenset({"5", "2"}), frozenset({"3", "1 of 9"}),
    }  # fmt: skip


def test_windows_of_many_posts_leave_little_room_and_change_with_the_seed() -> None:
    corpus = corpus_of(*np.random.default_rng(0).integers(1, 60, 2000).tolist())
    first, second = corpus.windows(32, "0-0-32"), corpus.windows(32, "0-1-32")
    for windows in (first, second):
        covered = sorted(piece for window in windows for piece in window)
        assert [begin for begin, _ in covered] == [0, *(end for _, end in covered[:-1])]
        assert covered[-1][1] == len(corpus.ids)
        assert max(sum(end - begin + 1 for begin, end in window) for window in windows) <= 33
    needed = sum(end - begin + 1 for window in first for begin, end in window)
    assert len(first) * 33 < 1.02 * needed
    assert first == corpus.windows(32, "0-0-32") and first != second


def test_a_batch_predicts_the_end_of_each_post_and_nothing_behind_the_last() -> None:
    inputs, targets = corpus_of(2, 3, 8).batch([[(0, 2), (2, 5)], [(5, 13)]], 8)
    assert inputs.tolist() == [[2, 10, 11, 2, 12, 13, 14, 2], [2, 15, 16, 17, 18, 19, 20, 21]]
    assert targets.tolist() == [
        [10, 11, 2, 12, 13, 14, 2, IGNORED],
        [15, 16, 17, 18, 19, 20, 21, 22],  # the window is full: nothing is known of what follows
    ]


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    budget = Budget("tokens", 1000, 0.25)
    assert [Position(steps=step).rate(budget, warmup=4) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert [Position(tokens=tokens).decays(budget) for tokens in (0, 749, 750)] == [False, False, True]
    falling = [Position(9, tokens, decay_from=800).rate(budget, 4) for tokens in (800, 850, 950, 1000, 1010)]
    assert falling == pytest.approx([1.0, 0.75, 0.25, 0.0, 0.0])
    assert [Position(tokens=tokens).ends(budget) for tokens in (999, 1000)] == [False, True]
    assert Position(seconds=60.0).ends(Budget("seconds", 60.0, 0.25))
    assert not Position(tokens=10**12).decays(FOREVER) and not Position(tokens=10**12).ends(FOREVER)


CORPUS = corpus_of(*[9] * 40)


@pytest.mark.parametrize("tokens", [1, attention.BLOCK, attention.BLOCK + 1, 300])
def test_attention_in_blocks_and_its_gradients_are_those_of_pytorch(tokens: int) -> None:
    torch.manual_seed(0)
    found = [torch.randn(2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = found
    ours, _ = attention.in_blocks(nn.Identity(), query, key, value, None, scaling=0.3)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), found), torch.autograd.grad((theirs * weights).sum(), found)
    )


def trainer(directory: Path) -> Trainer:
    small = "--layers 1 --hidden 8 --heads 2 --window 16 --last-window 24 --batch-tokens 48 --micro-batch-tokens 32"
    arguments = parse(["corpus", str(directory), *small.split(), "--device", "cpu", "--warmup", "2", "--no-compile"])
    return Trainer(make_model(1, 8, 2, 24, seed=0).train(), CORPUS, directory, arguments)


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_run_goes_on_to_the_same_weights_through_the_end_of_an_epoch_and_in_the_decay(tmp_path: Path) -> None:
    budget = Budget("tokens", 650, 0.25)  # a step has 30 tokens, 40 in the decay, and an epoch 13 steps
    whole = trainer(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    rows = []
    while not whole.position.ends(budget):
        rows.append(whole.step(budget))
    assert whole.position.epoch == 2 and whole.window == 24 and rows[-1]["rate"] < 1

    (tmp_path / "parts").mkdir()
    losses, ended = [], False
    while not ended:
        part = trainer(tmp_path / "parts")
        part.load(budget)
        for _ in range(5):
            losses.append(part.step(budget)["loss"])
            if ended := part.position.ends(budget):
                break
        part.save_here(budget)
    assert losses == [row["loss"] for row in rows]
    assert replace(part.position, seconds=0) == replace(whole.position, seconds=0)
    assert_equal(weights(part), weights(whole))


def test_a_finished_run_is_made_longer_from_before_its_decay(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    short = Budget("tokens", 200, 0.25)
    while not first.position.ends(short):
        before = weights(first)
        stable = first.position
        first.step(short)
        if first.position.decay_from is not None:
            break
    first.save_here(short)
    again = trainer(tmp_path)
    again.load(Budget("tokens", 400, 0.25))
    assert again.position == stable and again.position.decay_from is None
    assert_equal(weights(again), before)
    again.load(short)
    assert again.position == first.position


def test_the_model_is_one_that_the_library_loads(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    trained.step(FOREVER)
    trained.export(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.eos_token_id == EOS and context_length(str(tmp_path / "model")) == 24
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as stored:
        names = list(stored.keys())
    assert names and "lm_head.weight" not in names, "it is tied to the embeddings"
    assert_equal({name: value.to(torch.bfloat16).float() for name, value in weights(trained).items()}, found)


def test_the_largest_model_has_a_limit_and_budgets_exclude_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    default = parse(["corpus", "out"])
    model = make_model(default.layers, default.hidden, default.heads, 768, seed=0)
    assert sum(each.numel() for each in model.parameters()) < 8_000_000
    with pytest.raises(SystemExit):
        parse(["corpus", "out", "--tokens", "1", "--minutes", "1"])
    assert "two budgets; name one" in capsys.readouterr().err
