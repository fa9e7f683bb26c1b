"""ROUGE F1 through `evaluate`, from the metric module that ships with this package.

Words are those of `rayrlhf.rewards.stems`, of every script. `rouge_score` alone drops all letters but a to z.

`evaluate` copies the module into the Hugging Face modules cache, under a file lock. With `keep_in_memory` it writes
nothing else, so any number of processes can compute ROUGE at once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config_rl import ROUGE_NAMES
from rayrlhf.rewards.stems import stems


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F1 over n examples, in [0, 1], by the names in `ROUGE_NAMES`.

    Raises:
        ValueError: there are no examples, or not as many predictions as references.
    """
    return {name: float(values.mean()) for name, values in rouge_per_example(predictions, references).items()}


def rouge_per_example(predictions: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The F1 of each example, in [0, 1], as arrays [n] by name. Words are lower-cased and stemmed, see `rouge_scorer`.

    ROUGE-Lsum takes newlines as the ends of sentences; for texts of one line it equals ROUGE-L.
    An empty prediction or reference scores 0.

    Raises:
        ValueError: there are no examples, or not as many predictions as references.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"ROUGE needs pairs: {len(predictions)} predictions, {len(references)} references")
    result = _metric().compute(predictions=list(predictions), references=list(references), use_aggregator=False)
    return {name: np.asarray(result[name], dtype=np.float64) for name in ROUGE_NAMES}


@functools.cache
def rouge_scorer(*names: str) -> Any:
    """A `RougeScorer` over words of every script; those of more than three letters are stemmed (Porter, for English).

    Numbers for plain English are those of `RougeScorer(names, use_stemmer=True)`.
    """
    # Imported late, as below: only processes that compute ROUGE pay for it.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Stems(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return stems(text)

    return RougeScorer(list(names), tokenizer=Stems())


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F1 of one answer, in [0, 1]."""
    return float(rouge_scorer("rougeL").score(reference, answer)["rougeL"].fmeasure)


@functools.cache
def _metric() -> Any:
    # Heavy import (datasets, dill); only processes that compute ROUGE pay for it.
    import evaluate

    module = Path(__file__).parent.parent / "assets" / "metrics" / "rouge"
    return evaluate.load(str(module), keep_in_memory=True, experiment_id=f"rayrlhf-{os.getpid()}")
