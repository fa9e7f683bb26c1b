"""ROUGE as a local metric module for `evaluate.load`: no hub, no network.

One import per line: `evaluate` reads this file's imports line by line.
Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"; computed by the `rouge_score` package
over the words of `rayrlhf.data.words`.
"""

import datasets
import evaluate
import numpy as np

from rayrlhf.rewards.rouge import rouge_scorer

ROUGE_TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


class Rouge(evaluate.Metric):
    """F1 of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (sentences of the latter are separated by newlines)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE F1 between predictions and references, each in [0, 1].",
            citation="Lin, C.-Y. 2004. ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description="predictions: list of n texts; references: list of n texts.",
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://aclanthology.org/W04-1013/"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        use_aggregator: bool = True,
    ) -> dict[str, float] | dict[str, list[float]]:
        """Means over the examples, or with `use_aggregator=False` one number per example."""
        scorer = rouge_scorer(*ROUGE_TYPES)
        pairs = zip(predictions, references, strict=True)
        scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
        per_example = {name: [float(score[name].fmeasure) for score in scores] for name in ROUGE_TYPES}
        if use_aggregator:
            return {name: float(np.mean(values)) for name, values in per_example.items()}
        return per_example
