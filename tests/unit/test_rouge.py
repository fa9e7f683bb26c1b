"""ROUGE through the local `evaluate` module against `rouge_score` itself and against counts by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer

from rayrlhf.config_rl import ROUGE_NAMES
from rayrlhf.rewards.rouge import rouge, rouge_l, rouge_per_example

PREDICTIONS = [
    "My girlfriend lies about running shoes.",
    "",
    "the cat sat on the mat",
    "First sentence here.\nSecond one there.",
    "It's 3.5 km – isn't it? (123_456)",
]
REFERENCES = [
    "Girlfriend lied to me about the shoes she runs in, what now?",
    "an answer",
    "the cat was sitting on the mat",
    "Second one there.\nFirst sentence here.",
    "its 3.5 km, 456",
]


def test_equals_rouge_score_example_by_example() -> None:
    scorer = rouge_scorer.RougeScorer(list(ROUGE_NAMES), use_stemmer=True)
    expected = [scorer.score(r, p) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    got = rouge_per_example(PREDICTIONS, REFERENCES)
    assert set(got) == set(ROUGE_NAMES)
    for name in ROUGE_NAMES:
        np.testing.assert_array_equal(got[name], [score[name].fmeasure for score in expected])
        assert rouge(PREDICTIONS, REFERENCES)[name] == pytest.approx(np.mean([s[name].fmeasure for s in expected]))


def test_counts_by_hand() -> None:
    # 6 and 7 words, 5 in common; bigrams 5 and 6, "the cat", "on the", "the mat" in common; LCS "the cat on the mat".
    got = rouge(["the cat sat on the mat"], ["the cat was sitting on the mat"])
    assert got["rouge1"] == pytest.approx(2 * 5 / 13)
    assert got["rouge2"] == pytest.approx(2 * 3 / 11)
    assert got["rougeL"] == pytest.approx(2 * 5 / 13)


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge2"),
    [
        ("gr ere pfel s", "größere Äpfel süß", 0.0, 0.0),  # what is left without all letters but a to z
        ("Größere Äpfel schmecken süß", "größere Äpfel süß", 2 * 3 / 7, 2 * 1 / 5),
        ("сосед почистил сад вчера", "сосед почистил окно вчера", 3 / 4, 1 / 3),
        ("叶绿素分解。", "叶绿素没有了", 2 * 3 / 11, 2 * 2 / 9),  # 5 and 6 characters
        ("cafe", "café", 0.0, 0.0),
    ],
)
def test_every_script_by_hand(prediction: str, reference: str, rouge1: float, rouge2: float) -> None:
    got = rouge([prediction], [reference])
    assert got["rouge1"] == pytest.approx(rouge1) and got["rouge2"] == pytest.approx(rouge2)
    assert rouge_l(reference, prediction) == pytest.approx(got["rougeL"])


def test_stemmer_is_on() -> None:
    assert rouge(["running shoes"], ["run shoe"])["rouge1"] == 1.0


def test_sentence_order_matters_to_rouge_l_alone() -> None:
    got = rouge([PREDICTIONS[3]], [REFERENCES[3]])
    assert got["rougeLsum"] == 1.0
    assert got["rougeL"] < 1.0


def test_repeated_calls_do_not_accumulate() -> None:
    assert rouge(["a b"], ["a b"])["rouge1"] == 1.0
    assert rouge(["c d"], ["e f"])["rouge1"] == 0.0
    assert len(rouge_per_example(["a", "b", "c"], ["a", "x", "c"])["rouge1"]) == 3


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_refuses_what_is_not_pairs(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="ROUGE needs pairs"):
        rouge(predictions, references)


# Two processes that import all of `evaluate`.
@pytest.mark.long
def test_concurrent_processes_with_an_empty_cache_offline(tmp_path: Path) -> None:
    """Two first uses at once: the module copy races, and nothing may be asked of the network."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network access')\n"
        "socket.getaddrinfo = refuse; socket.create_connection = refuse\n"
        "from rayrlhf.rewards.rouge import rouge\n"
        "print(rouge(['the cat sat'] * 50, ['the cat ran'] * 50)['rouge1'])\n"
    )
    env = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        assert float(out) == pytest.approx(2 / 3)
    written = [p.name for p in (tmp_path / "hf").rglob("*.arrow")]
    assert written == []
