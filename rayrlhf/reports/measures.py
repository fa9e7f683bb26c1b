"""The table of measures: each number's words, unit and format, once for progress lines, report, curves and `compare`.

A measure that is not in this table is written to metrics.jsonl and shown nowhere. To show a new one, add a row:

    Panel("Entropy", "nats per token", (Measure("rl/entropy", "entropy", ".3f"),))

This file imports nothing outside the standard library: `rayrlhf status` and `rayrlhf runs` read it and are to answer at
once. What draws or reads Parquet is in the files beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measure:
    """One number of a step in metrics.jsonl."""

    name: str
    """Its name there."""
    words: str
    """A few words for a line or a legend."""
    form: str = ".3f"
    """Format specification; a unit may follow after a blank."""
    in_line: bool = False
    """Whether the line that is printed for a step has it."""
    spread: str = ""
    """The metric that holds its standard deviation over the step's responses; empty where nothing does."""
    legend: str | None = None
    """Words beside the other curves of its panel; `words` where None."""

    def number(self, value: float | None) -> str:
        """The value without its unit; `n/a` where it is not known or not finite."""
        spec = self.form.partition(" ")[0]
        return "n/a" if value is None or not math.isfinite(value) else format(value, spec)

    def text(self, value: float | None) -> str:
        """
        >>> Measure("rl/kl", "KL", ".3f nats").text(1.5)
        '1.500 nats'
        """
        unit = self.form.partition(" ")[2]
        return f"{self.number(value)} {unit}" if unit else self.number(value)


@dataclass(frozen=True)
class Panel:
    """Measures that share a unit, and so one pair of axes."""

    title: str
    unit: str
    measures: tuple[Measure, ...]
    stacked: bool = False
    """Whether the measures are parts of a whole, drawn on top of one another."""
    compared: bool = False
    """Whether `rayrlhf compare` draws the first of its measures."""


PHASES = ("generate", "score", "learn", "sync")
"""The parts of a RL step; `time/PHASE` is in seconds."""
PHASE_S = Measure("time/PHASE", "phase", ".1f")
STEP_S = Measure("time/step", "step", ".1f s")
TOKENS_PER_S = Measure("throughput/tokens_per_s", "tokens", ",.0f tok/s")

PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        Panel("Loss", "nats per token", (
            Measure("sft/loss", "loss", ".4f", in_line=True, legend="train"),
            Measure("sft/dev_loss", "dev loss", ".4f", in_line=True, legend="dev"),
        )),
        Panel("ROUGE on dev prompts", "F1", (
            Measure("sft/rouge1", "ROUGE-1", in_line=True),
            Measure("sft/rouge2", "ROUGE-2"),
            Measure("sft/rougeL", "ROUGE-L", in_line=True),
        )),
        Panel("Learning rate", "", (Measure("sft/lr", "lr", ".2e", in_line=True),)),
    ),
    "reward_model": (
        Panel("Loss", "nats per pair", (Measure("reward_model/loss", "loss", ".4f", in_line=True),)),
        Panel("Accuracy", "share of pairs", (
            Measure("reward_model/accuracy", "accuracy", in_line=True, legend="train"),
            Measure("reward_model/heldout_accuracy", "held-out", in_line=True, legend="held out"),
            Measure("reward_model/minus_length", "held-out accuracy minus that of length", "+.3f"),
        )),
        Panel("Margin, chosen − rejected", "score", (Measure("reward_model/margin", "margin", in_line=True),)),
    ),
    "dpo": (
        Panel("Loss", "per pair or answer", (
            Measure("dpo/loss", "loss", ".4f", in_line=True, legend="train"),
            Measure("dpo/heldout_loss", "held-out loss", ".4f", legend="held out"),
        )),
        Panel("Accuracy of the implicit reward", "share of pairs or answers", (
            Measure("dpo/accuracy", "accuracy", in_line=True, legend="train"),
            Measure("dpo/heldout_accuracy", "held-out", in_line=True, legend="held out"),
        )),
        Panel("Margin, chosen − rejected", "reward", (
            Measure("dpo/margin", "margin", in_line=True, legend="train"),
            Measure("dpo/heldout_margin", "held-out margin", legend="held out"),
        )),
        Panel("Implicit reward of both sides", "reward", (
            Measure("dpo/reward/chosen", "chosen", in_line=True),
            Measure("dpo/reward/rejected", "rejected", in_line=True),
        )),
        Panel("KL estimate (KTO)", "nats per response", (Measure("dpo/kl", "KL"),)),
    ),
    "rl": (
        Panel("Proxy: reward model's score", "score", (
            Measure("rl/score/mean", "score", in_line=True, spread="rl/score/std", legend="reward model"),
            Measure("rl/reward/mean", "reward", in_line=True, legend="with KL penalty"),
        ), compared=True),
        Panel("Gold: labeller's own measure", "gold", (
            Measure("rl/gold/mean", "gold", in_line=True, spread="rl/gold/std"),
        ), compared=True),
        Panel("KL to the reference policy", "nats per response", (
            Measure("rl/kl", "KL", ".3f nats", in_line=True, spread="rl/kl_std"),
        ), compared=True),
        Panel("Response length", "tokens", (
            Measure("rl/length/mean", "length", ".1f", in_line=True, spread="rl/length/std"),
        ), compared=True),
        Panel("Responses that end by themselves", "share", (
            Measure("rl/eos_rate", "EOS", ".0%", in_line=True),
        ), compared=True),
        Panel("Entropy", "nats per token", (Measure("rl/entropy", "entropy"),), compared=True),
        Panel("Diversity of the answers' words", "share", (
            Measure("rl/distinct_2", "distinct-2", legend="different 2-grams"),
            Measure("rl/repetition", "repeated 4-grams", legend="repeated 4-grams of an answer"),
            Measure("rl/common_opening", "commonest opening"),
        )),
        Panel("Policy loss", "", (Measure("rl/policy_loss", "policy loss", ".4f", in_line=True),)),
        Panel("Value loss", "", (Measure("rl/value_loss", "value loss", ".4f", in_line=True),)),
        Panel("Explained variance of returns", "share", (Measure("rl/explained_variance", "value model"),)),
        Panel("Clipped tokens", "share", (Measure("rl/clip_fraction", "clip fraction"),)),
        Panel("Approximate KL of an update", "nats per token", (Measure("rl/approx_kl", "new to old policy"),)),
        Panel("Log-prob gap, generator to learner", "nats", (
            Measure("rl/logprob_gap/mean", "log-prob gap", ".1e", in_line=True, legend="mean"),
            Measure("rl/logprob_gap/max", "largest log-prob gap", ".1e", legend="max"),
        )),
        Panel("Gradient norm before clipping", "", (
            Measure("rl/grad_norm", "policy"),
            Measure("rl/value_grad_norm", "value"),
        )),
        Panel("Coefficient of the KL penalty", "reward per nat", (Measure("rl/kl_coefficient", "beta"),)),
        Panel("Seconds by phase", "s", tuple(
            replace(PHASE_S, name=f"time/{phase}", words=phase) for phase in PHASES
        ), stacked=True),
        Panel("Throughput", "tokens per s", (TOKENS_PER_S,)),
    ),
    "rl_eval": (
        Panel("Dev prompts: score", "score", (Measure("rl_eval/score", "score", in_line=True),)),
        Panel("Dev prompts: gold", "gold", (Measure("rl_eval/gold", "gold", in_line=True),)),
        Panel("Dev prompts: KL to the reference policy", "nats per response", (
            Measure("rl_eval/kl", "KL", ".3f nats", in_line=True),
        )),
        Panel("Dev prompts: length", "tokens", (Measure("rl_eval/length", "length", ".1f", in_line=True),)),
        Panel("Dev prompts: answers that end by themselves", "share", (
            Measure("rl_eval/eos_rate", "EOS", ".0%", in_line=True),
        )),
        Panel("Dev prompts: diversity of the words", "share", (
            Measure("rl_eval/distinct_2", "distinct-2", in_line=True, legend="different 2-grams"),
            Measure("rl_eval/repetition", "repeated 4-grams", legend="repeated 4-grams of an answer"),
            Measure("rl_eval/common_opening", "commonest opening"),
        )),
    ),
}  # fmt: skip
"""By stage, in the order in which they are read: what its steps measure; of `rl_eval` its evaluations during `rl`."""


def panels_of(stage: str, names: Iterable[str]) -> tuple[Panel, ...]:
    """The panels of a stage; where there are several rewards, whose names the config gives, also one of these.

    Args:
        stage: a key of `PANELS`.
        names: of the metrics that were written.
    """
    own = sorted(name for name in names if name.startswith(f"{stage}/rewards/"))
    rewards = tuple(Measure(name, name.rpartition("/")[2]) for name in own)
    first, *others = PANELS[stage]
    return (first, *([Panel("Each reward, weight included", "score", rewards)] if rewards else []), *others)


STEP_MEASURES = {measure.name: measure for stage in PANELS.values() for panel in stage for measure in panel.measures}


def measures_in_line(stage: str) -> list[Measure]:
    """The measures that the line on a step of this stage shows, in order."""
    return [measure for panel in PANELS.get(stage, ()) for measure in panel.measures if measure.in_line]


# ---- what an evaluation measures

MEASURES = {
    "gold": "labeller's measure (gold)",
    "reward": "reward model's score",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "content_words_in_post": "content words from the post",
    "length": "length, tokens",
    "eos_rate": "ends with EOS",
}
"""Measures of one answer, and their words."""
DIVERSITY = {
    "distinct_2": "different 2-grams of all answers",
    "repetition": "repeated 4-grams of an answer",
    "common_opening": "commonest opening of 4 words",
}
"""Measures of all answers of a source together, shares, and their words."""
AT_EQUAL_LENGTH = ("reward", "gold")
"""Measures whose paired difference is also given for answers of equal length."""
WIN_RATES = {
    "win_rate_vs_sft": "win rate against SFT",
    "lc_win_rate_vs_sft": "the same at equal length",
    "gold_win_rate_vs_sft": "win rate against SFT by gold",
    "gold_lc_win_rate_vs_sft": "the same at equal length, gold",
}
"""The policy's win rates over the SFT model; `lc` is length-controlled."""
VS_PREVIOUS = {
    "win_rate_vs_previous": "win rate against the round before",
    "gold_win_rate_vs_previous": "the same by gold",
}
"""The policy's win rates over that of the round before."""
SHARES = ("eos_rate", "win_rate_vs_reference", *WIN_RATES, *VS_PREVIOUS)
"""Measures of an evaluation that are shares of the prompts."""
WITHIN_ONE = (*SHARES, "rouge1", "rouge2", "rougeL")
"""Those that are never below 0 or above 1."""
EVALUATED = {
    **MEASURES,
    "kl": "KL to SFT, nats per response",
    **DIVERSITY,
    "win_rate_vs_reference": "win rate against the reference",
    **WIN_RATES,
    **VS_PREVIOUS,
}
"""All that evaluation.json has of one source of answers, in the order of the tables' rows: gold and score lead, since a
win rate does not say by how much, nor whether all answers have become one."""


@dataclass(frozen=True)
class Source:
    """A source of answers: a model, or people."""

    words: str
    in_full: str
    """For a reader who has not seen this project before."""


SOURCES = {
    "reference": Source("reference", "reference"),
    "title": Source("title", "post's title"),
    "sft": Source("SFT", "SFT"),
    "best_of": Source("best of n", "SFT, best of n"),
    "dpo": Source("DPO", "DPO"),
    "previous": Source("previous", "policy of the round before"),
    "policy": Source("policy", "policy"),
}
"""The sources of answers in evaluation.json, the most trained last."""
DIFFERENCES = {
    "policy_minus_sft": "policy − SFT, paired",
    "policy_minus_best_of": "policy − best of n, paired",
    "policy_minus_dpo": "policy − DPO, paired",
    "policy_minus_previous": "policy − round before, paired",
    "policy_minus_sft_at_equal_length": "the same at equal length",
}

SCORERS = {
    "reward_model": "reward model",
    "longer": "longer answer",
    "shorter": "shorter answer",
    "sft_logprob_sum": "SFT log-prob, sum",
    "sft_logprob_mean": "SFT log-prob, mean per token",
}
"""The scorers that order held-out pairs in reward_model.json. Length is in tokens, as the reward model reads it."""


def decimals(means: Sequence[float]) -> int:
    """Decimals of the numbers in one row: a score of 0.123 needs three, a length of 31.2 tokens one."""
    return 1 if max(map(abs, means)) >= 10 else 3


def interval_text(value: Mapping[str, float] | None) -> str:
    """`mean [low, high]`; a dash where nothing was measured.

    >>> interval_text({"mean": 0.5, "low": 0.25, "high": 0.75})
    '0.500 [0.250, 0.750]'
    """
    if value is None:
        return "–"
    form = f"z.{decimals([value['mean']])}f"
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
