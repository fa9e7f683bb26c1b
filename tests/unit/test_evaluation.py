"""evaluation.json key by key, and samples.parquet, against numpy on the same arrays."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rouge_score import rouge_scorer

from rayrlhf.data.records import Prompt
from rayrlhf.reports.evaluation import (
    Answers,
    diversity_of,
    samples_table,
    summarize,
    with_content_words,
    with_rouge,
    write_evaluation,
    write_samples,
)
from rayrlhf.reports.intervals import length_controlled_win_rate
from rayrlhf.reports.measures import VS_PREVIOUS, WIN_RATES
from rayrlhf.rewards.content import Vocabulary

PROMPTS = [
    Prompt("a", "post a", reference=" the cat sat on the mat", title="cat"),
    Prompt("b", "post b", reference=" dogs run fast", title=None),
    Prompt("c", "post c", reference=None, title="no summary"),
    Prompt("d", "post d", reference=" we went home early", title="home"),
]
SFT = Answers(
    "sft",
    [" the cat sat", " dogs", " something", " home"],
    rewards=[0.0, 1.0, 2.0, 3.0],
    gold=[0.5, 0.25, np.nan, 0.75],
    lengths=[4, 2, 2, 2],
    finished=[True, True, False, True],
    content_words=[1, 0, 2, 0],
)
POLICY = Answers(
    "policy",
    [" a cat sat on a mat", " dogs run", " thing", " went home"],
    rewards=[1.0, 1.0, 1.0, 4.0],
    gold=[0.75, 0.5, np.nan, 1.0],
    lengths=[7, 3, 2, 3],
    finished=[True, False, False, True],
    kl=[0.5, 1.5, 0.0, 2.0],
    content_words=[2, 0, 3, 1],
)
REFERENCE = Answers("reference", [p.reference for p in PROMPTS], rewards=[0.5, 0.5, 9.9, 4.0], lengths=[8, 4, 0, 5])
TITLE = Answers("title", [p.title for p in PROMPTS], rewards=[-1.0, 9.9, 0.0, 0.0], gold=[0.1, 9.9, np.nan, 0.2])


def summary(labeller: str, policy: Answers | None = POLICY) -> dict[str, Any]:
    facts = {"split": "test", "checkpoints": {"sft": "/runs/x/sft"}, "seeds": {"run": 3}}
    return summarize(PROMPTS, SFT, policy, REFERENCE, TITLE, labeller=labeller, metadata=facts, samples=200)


def test_without_references_rouge_and_gold_are_left_out() -> None:
    bare = [replace(prompt, reference=None) for prompt in PROMPTS]
    sft, policy = (replace(answers, gold=[np.nan] * 4) for answers in (SFT, POLICY))
    reference = Answers("reference", [None] * 4, rewards=[1.0] * 4, lengths=[1] * 4)
    result = summarize(bare, sft, policy, reference, None, labeller="people", metadata={}, samples=200)
    for measure in ("gold", "rouge1", "rouge2", "rougeL"):
        assert result["policy"][measure] is None and result["differences"]["policy_minus_sft"][measure] is None
    assert result["policy"]["gold_win_rate_vs_sft"] is result["policy"]["win_rate_vs_reference"] is None
    assert set(result["reference"].values()) == {None}
    assert result["policy"]["reward"] == summary("file")["policy"]["reward"]
    assert samples_table(bare, [reference, sft, policy]).column("reference").null_count == 4


def test_keys_are_those_of_the_design() -> None:
    result = summary("file")
    common = {"reward", "gold", "rouge1", "rouge2", "rougeL", "content_words_in_post", "length", "eos_rate"}
    common |= {"win_rate_vs_reference"}
    together = {"distinct_2", "repetition", "common_opening"}
    assert set(result) == {"sft", "policy", "title", "reference", "differences", "metadata"}
    assert set(result["sft"]) == set(result["title"]) == set(result["reference"]) == common | together
    win_rates = {"win_rate_vs_sft", "lc_win_rate_vs_sft", "gold_win_rate_vs_sft", "gold_lc_win_rate_vs_sft"}
    assert set(result["policy"]) == common | together | win_rates | {"kl"}
    assert [name for name in result["policy"] if name in win_rates] == list(WIN_RATES)
    assert set(result["differences"]) == {"policy_minus_sft", "policy_minus_sft_at_equal_length"}
    assert set(result["differences"]["policy_minus_sft"]) == common - {"win_rate_vs_reference"}
    for value in result["differences"]["policy_minus_sft"].values():
        assert set(value) == {"mean", "low", "high", "n", "p"}
    assert set(result["differences"]["policy_minus_sft_at_equal_length"]) == {"reward", "gold"}
    for row in (result[name] for name in ("sft", "policy", "title", "reference")):
        for value in row.values():
            assert value is None or set(value) == {"mean", "low", "high", "n"}
    assert result["metadata"] == {
        "labeller": "file",
        "prompts": 4,
        "bootstrap": {"samples": 200, "seed": 0, "confidence": 0.95, "unit": "prompt"},
        "split": "test",
        "checkpoints": {"sft": "/runs/x/sft"},
        "seeds": {"run": 3},
    }


def test_the_best_of_several_answers_is_a_source_of_its_own() -> None:
    best = replace(POLICY, name="best_of", rewards=[2.0, 1.0, 1.0, 3.0], kl=np.full(4, np.log(3) - 2 / 3))
    facts = {"best_of": 3}
    result = summarize(PROMPTS, SFT, POLICY, REFERENCE, None, [best], labeller="file", metadata=facts, samples=200)
    assert result["best_of"]["kl"] == {"mean": pytest.approx(0.43194562), "low": pytest.approx(0.43194562),
                                       "high": pytest.approx(0.43194562), "n": 4}  # fmt: skip
    assert result["best_of"]["reward"]["mean"] == 1.75
    assert result["differences"]["policy_minus_best_of"]["reward"]["mean"] == pytest.approx((-1 + 0 + 0 + 1) / 4)
    assert "best_of" not in summary("file")


def test_the_policy_of_the_round_before_is_a_source_of_its_own() -> None:
    before = replace(POLICY, name="previous", rewards=[2.0, 1.0, 0.0, 3.0], gold=[0.5, 0.75, np.nan, 1.0])
    result = summarize(PROMPTS, SFT, POLICY, REFERENCE, None, [before], labeller="file", metadata={}, samples=200)
    wins = {name: (result["policy"][name]["mean"], result["policy"][name]["n"]) for name in VS_PREVIOUS}
    assert wins == {
        "win_rate_vs_previous": (pytest.approx((0 + 0.5 + 1 + 1) / 4), 4),
        "gold_win_rate_vs_previous": (pytest.approx((1 + 0 + 0.5) / 3), 3),
    }
    assert result["differences"]["policy_minus_previous"]["reward"]["mean"] == pytest.approx((-1 + 0 + 1 + 1) / 4)
    assert not set(VS_PREVIOUS) & set(summary("file")["policy"])


def test_means_and_counts_against_hand_computation() -> None:
    result = summary("file")

    def mean(source: str, measure: str) -> tuple[Any, int]:
        return pytest.approx(result[source][measure]["mean"]), result[source][measure]["n"]

    assert mean("sft", "reward") == (1.5, 4)
    assert mean("sft", "gold") == (0.5, 3)
    assert mean("sft", "eos_rate") == (0.75, 4)
    assert mean("policy", "length") == (3.75, 4)
    assert mean("policy", "kl") == (1.0, 4)
    assert mean("policy", "content_words_in_post") == (1.5, 4)
    assert result["differences"]["policy_minus_sft"]["content_words_in_post"]["mean"] == 0.75
    # c has no reference and the title of b is missing: neither counts, whatever number stands there.
    assert mean("sft", "win_rate_vs_reference") == ((0 + 1 + 0) / 3, 3)
    assert mean("policy", "win_rate_vs_reference") == ((1 + 1 + 0.5) / 3, 3)
    assert mean("policy", "win_rate_vs_sft") == ((1 + 0.5 + 0 + 1) / 4, 4)
    assert mean("title", "reward") == (-1 / 3, 3)
    assert mean("title", "gold") == (0.15, 2)
    assert mean("reference", "reward") == ((0.5 + 0.5 + 4.0) / 3, 3)
    assert mean("reference", "length") == (17 / 3, 3)
    assert mean("policy", "gold_win_rate_vs_sft") == (1.0, 3)
    gold = result["differences"]["policy_minus_sft"]["gold"]
    assert gold["mean"] == pytest.approx(0.25)
    assert gold["p"] == 2 / 2**3  # all three differences are equal: only the flips of all and of none are as extreme


def test_equal_length_uses_the_lengths_of_both() -> None:
    result = summary("file")
    longer, rewards = np.array([3, 1, 0, 1]), np.array([1, 0, -1, 1])
    intercept = np.polyfit(longer, rewards, 1)[1]
    assert result["differences"]["policy_minus_sft_at_equal_length"]["reward"]["mean"] == pytest.approx(intercept)
    sft, policy = ([0.0, 1.0, 2.0, 3.0], [4, 2, 2, 2]), ([1.0, 1.0, 1.0, 4.0], [7, 3, 2, 3])
    expected = length_controlled_win_rate(policy[0], sft[0], policy[1], sft[1], 200)
    assert expected is not None
    assert result["policy"]["lc_win_rate_vs_sft"] == asdict(expected)
    assert result["policy"]["gold_lc_win_rate_vs_sft"]["n"] == 3
    unmeasured = summarize(
        PROMPTS, replace(SFT, lengths=None), POLICY, REFERENCE, None, labeller="file", metadata={}, samples=20
    )
    assert unmeasured["policy"]["lc_win_rate_vs_sft"] is None
    assert unmeasured["differences"]["policy_minus_sft_at_equal_length"] == {"reward": None, "gold": None}


def test_diversity_is_of_all_answers_of_a_source_together() -> None:
    """By the plain definition, with the interval of a plain jackknife; an answer that is missing does not count."""
    texts = ["a b c d e", "a b c d f", None, "x y", "a b c d a b c d"]
    found = diversity_of(Answers("sft", texts))
    given = [text.split() for text in texts if text is not None]

    def distinct(answers: list[list[str]]) -> float:
        pairs = [pair for words in answers for pair in itertools.pairwise(words)]
        return len(set(pairs)) / len(pairs)

    def common(answers: list[list[str]]) -> float:
        return max(Counter(tuple(words[:4]) for words in answers).values()) / len(answers)

    def repeated(answers: list[list[str]]) -> float:
        return sum(0.2 for words in answers if len(words) == 8) / len(answers)

    for name, statistic in (("distinct_2", distinct), ("common_opening", common), ("repetition", repeated)):
        left = np.array([statistic(given[:i] + given[i + 1 :]) for i in range(4)])
        error = np.sqrt(3 / 4 * np.sum((left - left.mean()) ** 2))
        interval = found[name]
        assert interval is not None and interval.n == 4
        assert interval.mean == pytest.approx(statistic(given))
        assert interval.low == pytest.approx(max(0.0, statistic(given) - 1.959964 * error))
        assert interval.high == pytest.approx(min(1.0, statistic(given) + 1.959964 * error))
    assert set(diversity_of(Answers("sft", ["a b", None])).values()) == {None}
    assert diversity_of(Answers("sft", ["a", "b c"]))["distinct_2"] is None, "without the second there is no pair"


def test_rouge_is_against_the_reference_of_the_same_prompt() -> None:
    result = summary("file")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name, source in (("sft", SFT), ("policy", POLICY)):
        for kind in ("rouge1", "rouge2", "rougeL"):
            scores = [
                scorer.score(p.reference, str(text))[kind].fmeasure
                for p, text in zip(PROMPTS, source.texts, strict=True)
                if p.reference
            ]
            assert result[name][kind]["mean"] == pytest.approx(np.mean(scores))
            assert result[name][kind]["n"] == 3
    assert result["title"]["rouge1"]["n"] == 2
    assert result["reference"]["rouge1"] is None


def test_null_where_a_measure_means_nothing() -> None:
    result = summary("reference")
    for name in ("sft", "policy", "title", "reference"):
        assert result[name]["win_rate_vs_reference"] is None
    assert result["policy"]["win_rate_vs_sft"] is not None
    assert summary("file")["reference"]["win_rate_vs_reference"] is None
    assert result["title"]["eos_rate"] is None and result["title"]["content_words_in_post"] is None
    assert result["reference"]["gold"] is None
    before_rl = summary("file", policy=None)
    assert set(before_rl) == {"sft", "title", "reference", "metadata"}


def test_answers_that_do_not_fit_are_refused() -> None:
    short = Answers("sft", [" one"], rewards=[1.0])
    with pytest.raises(ValueError, match="1 answers to 4 prompts"):
        summarize(PROMPTS, short, None, REFERENCE, None, labeller="file", metadata={})
    with pytest.raises(ValueError, match="sft: reward has shape"):
        Answers("sft", [" one", " two"], rewards=[1.0]).measure("reward")


def test_content_words_are_those_of_the_prompt() -> None:
    answers = Answers("sft", ["the cat and the post", "post cat dog", None, "nothing"])
    posts = [Prompt("1", "The cat posts."), Prompt("2", "cats"), Prompt("3", "cat"), Prompt("4", "cat")]
    vocabulary = Vocabulary.of(["the end", *[f"word{i}" for i in range(10)]])  # 1 of 11 texts has "the": more than 3 %
    counted = with_content_words(answers, posts, vocabulary).measure("content_words_in_post")
    np.testing.assert_array_equal(counted, [2, 1, np.nan, 0])


def test_no_reference_at_all() -> None:
    answers = with_rouge(SFT, [None] * 4)
    assert answers.measure("rouge1") is None


def test_files(tmp_path: Path) -> None:
    result = summary("file")
    write_evaluation(tmp_path / "evaluation.json", result)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    with pytest.raises(ValueError, match="JSON"):
        write_evaluation(tmp_path / "evaluation.json", {"sft": float("nan")})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result

    write_samples(tmp_path / "samples.parquet", samples_table(PROMPTS, [REFERENCE, SFT, POLICY]))
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    measures = ("reward", "gold", "rouge1", "rouge2", "rougeL", "content_words_in_post", "length", "eos_rate")
    columns = {f"{measure}_{source}" for measure in measures for source in ("sft", "policy")}
    columns |= {"kl_policy", "reward_reference", "length_reference"}
    assert set(rows[0]) == {"id", "post", "reference", "sft", "policy"} | columns
    third: dict[str, Any] = {"id": "c", "post": "post c", "reference": None, "sft": " something", "policy": " thing"}
    third |= {"reward_reference": None, "reward_sft": 2.0, "reward_policy": 1.0, "gold_sft": None, "gold_policy": None}
    third |= {"rouge1_policy": None, "length_sft": 2.0, "eos_rate_policy": 0.0, "kl_policy": 0.0}
    assert {name: rows[2][name] for name in third} == third
    assert [row["rouge1_policy"] for row in rows if row["reference"]] == pytest.approx(
        [2 * 4 / (6 + 6), 2 * 2 / (2 + 3), 2 * 2 / (2 + 4)]
    )
    assert (rows[0]["reward_policy"], rows[0]["gold_policy"]) == (1.0, 0.75)
