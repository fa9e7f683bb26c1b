"""Intervals against scipy and known coverage; evaluation.json key by key against numpy on the same arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rouge_score import rouge_scorer
from scipy import stats

from rayrlhf import evaluation
from rayrlhf.data.records import Prompt
from rayrlhf.evaluation import (
    Answers,
    bootstrap,
    paired_difference,
    samples_table,
    summarize,
    win_rate,
    with_rouge,
    write_evaluation,
    write_samples,
)


@pytest.mark.parametrize(("n", "confidence"), [(200, 0.95), (37, 0.8)])
def test_bootstrap_equals_scipy(n: int, confidence: float) -> None:
    values = np.random.default_rng(1).exponential(size=n)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=confidence, method="percentile", random_state=7
    ).confidence_interval
    got = bootstrap(values, 2000, seed=7, confidence=confidence)
    assert got is not None
    assert got.mean == pytest.approx(values.mean())
    # Independent resamples: the quantiles agree up to Monte-Carlo noise, a small share of the interval's width.
    width = expected.high - expected.low
    assert got.low == pytest.approx(expected.low, abs=0.08 * width)
    assert got.high == pytest.approx(expected.high, abs=0.08 * width)
    assert got.n == n


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        got = bootstrap(rng.normal(3.0, 2.0, size=60), 400, seed=trial)
        assert got is not None
        hits += got.low <= 3.0 <= got.high
    assert 0.90 <= hits / 400 <= 0.98


def test_bootstrap_does_not_depend_on_its_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    whole = bootstrap(values, 301, seed=5)
    monkeypatch.setattr(evaluation, "_BLOCK", 50 * 7)
    assert bootstrap(values, 301, seed=5) == whole


def test_bootstrap_of_degenerate_input() -> None:
    one = bootstrap([2.5], 100, 0)
    assert one == evaluation.Interval(2.5, 2.5, 2.5, 1)
    assert bootstrap([np.nan, np.nan], 100, 0) is None
    assert bootstrap([], 100, 0) is None
    some = bootstrap([1.0, np.nan, 3.0], 100, 0)
    assert some == bootstrap([1.0, 3.0], 100, 0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, np.inf], 100, 0)
    with pytest.raises(ValueError, match="one dimension"):
        bootstrap([[1.0, 2.0]], 100, 0)


def test_pairing_removes_what_the_prompts_have_in_common() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 10, size=300)
    a, b = difficulty + 0.5 + rng.normal(0, 0.1, 300), difficulty + rng.normal(0, 0.1, 300)
    got = paired_difference(a, b, 1000, 0)
    assert got is not None
    assert got.mean == pytest.approx((a - b).mean())
    half = 1.96 * (a - b).std(ddof=1) / np.sqrt(300)  # normal theory
    assert got.high - got.low == pytest.approx(2 * half, rel=0.15)
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(a, b[:-1])


def test_win_rate_counts_ties_half_and_skips_the_unmeasured() -> None:
    got = win_rate([1.0, 2.0, 3.0, np.nan, 0.0], [0.0, 2.0, 4.0, 1.0, -1.0], 500, 0)
    assert got is not None
    assert got.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert got.n == 4
    assert 0.0 <= got.low < got.mean < got.high <= 1.0
    certain = win_rate(np.ones(20), np.zeros(20), 500, 0)
    assert certain == evaluation.Interval(1.0, 1.0, 1.0, 20)


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
)
POLICY = Answers(
    "policy",
    [" a cat sat on a mat", " dogs run", " thing", " went home"],
    rewards=[1.0, 1.0, 1.0, 4.0],
    gold=[0.75, 0.5, np.nan, 1.0],
    lengths=[7, 3, 2, 3],
    finished=[True, False, False, True],
    kl=[0.5, 1.5, 0.0, 2.0],
)
REFERENCE = Answers("reference", [p.reference for p in PROMPTS], rewards=[0.5, 0.5, 9.9, 4.0], lengths=[8, 4, 0, 5])
TITLE = Answers("title", [p.title for p in PROMPTS], rewards=[-1.0, 9.9, 0.0, 0.0], gold=[0.1, 9.9, np.nan, 0.2])


def summary(labeller: str, policy: Answers | None = POLICY) -> dict[str, Any]:
    facts = {"split": "test", "checkpoints": {"sft": "/runs/x/sft"}, "seeds": {"run": 3}}
    return summarize(PROMPTS, SFT, policy, REFERENCE, TITLE, labeller=labeller, metadata=facts, samples=200)


def test_keys_are_those_of_the_design() -> None:
    result = summary("file")
    common = {"reward", "gold", "rouge1", "rouge2", "rougeL", "length", "eos_rate", "win_rate_vs_reference"}
    assert set(result) == {"sft", "policy", "title", "reference", "differences", "metadata"}
    assert set(result["sft"]) == set(result["title"]) == set(result["reference"]) == common
    assert set(result["policy"]) == common | {"win_rate_vs_sft", "kl"}
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


def test_means_and_counts_against_hand_computation() -> None:
    result = summary("file")

    def mean(source: str, measure: str) -> tuple[Any, int]:
        return pytest.approx(result[source][measure]["mean"]), result[source][measure]["n"]

    assert mean("sft", "reward") == (1.5, 4)
    assert mean("sft", "gold") == (0.5, 3)
    assert mean("sft", "eos_rate") == (0.75, 4)
    assert mean("policy", "length") == (3.75, 4)
    assert mean("policy", "kl") == (1.0, 4)
    # c has no reference and the title of b is missing: neither counts, whatever number stands there.
    assert mean("sft", "win_rate_vs_reference") == ((0 + 1 + 0) / 3, 3)
    assert mean("policy", "win_rate_vs_reference") == ((1 + 1 + 0.5) / 3, 3)
    assert mean("policy", "win_rate_vs_sft") == ((1 + 0.5 + 0 + 1) / 4, 4)
    assert mean("title", "reward") == (-1 / 3, 3)
    assert mean("title", "gold") == (0.15, 2)
    assert mean("reference", "reward") == ((0.5 + 0.5 + 4.0) / 3, 3)
    assert mean("reference", "length") == (17 / 3, 3)
    assert result["differences"]["policy_minus_sft"]["gold"]["mean"] == pytest.approx(0.25)


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
    assert result["title"]["eos_rate"] is None
    assert result["reference"]["gold"] is None
    before_ppo = summary("file", policy=None)
    assert set(before_ppo) == {"sft", "title", "reference", "metadata"}


def test_answers_that_do_not_fit_are_refused() -> None:
    short = Answers("sft", [" one"], rewards=[1.0])
    with pytest.raises(ValueError, match="1 answers to 4 prompts"):
        summarize(PROMPTS, short, None, REFERENCE, None, labeller="file", metadata={})
    with pytest.raises(ValueError, match="sft: reward has shape"):
        Answers("sft", [" one", " two"], rewards=[1.0]).measure("reward")


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
    assert rows[2] == {
        "id": "c",
        "post": "post c",
        "reference": None,
        "sft": " something",
        "policy": " thing",
        "reward_reference": None,
        "reward_sft": 2.0,
        "reward_policy": 1.0,
        "gold_sft": None,
        "gold_policy": None,
    }
    assert (rows[0]["reward_policy"], rows[0]["gold_policy"]) == (1.0, 0.75)
