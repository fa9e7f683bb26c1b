"""What a run's numbers say, in sentences: is the policy better than SFT, at what KL, is the reward model exploited?

Every sentence follows from a rule over means and their 95 % intervals, and where there is too little evidence it says
so. `docs/report.md` lists the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayrlhf.reports.intervals import p_text
from rayrlhf.reports.measures import decimals
from rayrlhf.reports.peak import ERRORS_APART, FEW_STEPS, Peak, peak_of_gold
from rayrlhf.reports.reward_accuracy import unbeaten

Tone = Literal["good", "bad", "unclear", "plain"]
Numbers = Mapping[str, float]
"""`mean`, `low`, `high` and `n`, and for a paired difference `p`, as evaluation.json has them."""

ALPHA = 0.05
"""A difference that has a p-value counts only if it is below: the test and the interval have to agree."""
FEW_PROMPTS = 30
"""Below that a bootstrap interval is itself too uncertain: no verdict is given."""


@dataclass(frozen=True)
class Finding:
    """One sentence, and whether it is good news."""

    tone: Tone
    text: str


@dataclass(frozen=True)
class Figure:
    """One number that is shown large, with its interval and what it is compared with."""

    words: str
    mean: float
    low: float
    high: float
    unit: str = ""
    neutral: float | None = None
    """The value of no difference, such as 0 for a gain and 0.5 for a win rate; None where there is none."""
    percent: bool = False
    p: float | None = None
    """Of a paired difference."""

    @property
    def tone(self) -> Tone:
        """Whether the interval is wholly above or below `neutral`."""
        if self.neutral is None:
            return "plain"
        value = {"low": self.low - self.neutral, "high": self.high - self.neutral}
        return _TONES[_side(value if self.p is None else value | {"p": self.p})]

    @property
    def text(self) -> str:
        """The mean."""
        return self._text(self.mean)

    @property
    def interval(self) -> str:
        """Both limits."""
        return f"{self._text(self.low)} to {self._text(self.high)}"

    def _text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.1f} %"
        sign = "+" if self.neutral == 0 else ""
        return f"{value:{sign}z.{decimals([self.mean])}f}".replace("-", "−")


@dataclass(frozen=True)
class Verdict:
    """The sentence that leads, the numbers behind it, and the further sentences."""

    tone: Tone
    headline: str
    findings: tuple[Finding, ...] = ()
    figures: tuple[Figure, ...] = ()


def judge(
    evaluation: Mapping[str, Any] | None,
    steps: Sequence[Mapping[str, Any]],
    dev: Sequence[Mapping[str, Any]] = (),
    reward_model: Mapping[str, Any] | None = None,
    samples_per_prompt: int = 1,
) -> Verdict:
    """The verdict on a run, finished or not.

    Args:
        evaluation: the contents of evaluation.json; None before the run is evaluated.
        steps: lines of stage `rl` of metrics.jsonl.
        dev: lines of stage `rl_eval`, the evaluations on dev prompts during `rl`.
        reward_model: the contents of reward_model.json; None without one.
        samples_per_prompt: as for `peak_of_gold`.
    """
    found = evaluation or {}
    changes = found.get("differences", {}).get("policy_minus_sft", {})
    lead = _lead(found, changes)
    findings = [
        *_length(found, changes),
        *_proxy(changes),
        *_distance(found, dev),
        *_course(peak_of_gold(steps, samples_per_prompt), steps),
        *_wording(found),
        *([] if evaluation else _dev(dev)),
        *([_accuracy(reward_model)] if reward_model else []),
    ]
    return Verdict(lead.tone, lead.text, tuple(findings), tuple(_figures(found, changes)))


def _lead(found: Mapping[str, Any], changes: Mapping[str, Any]) -> Finding:
    """The sentence on gold, or on why there is none."""
    if not found:
        return Finding("unclear", "No verdict yet: the run has not been evaluated.")
    if "policy" not in found:
        return Finding("unclear", "No verdict: the evaluation has no policy to compare with SFT.")
    gold = changes.get("gold")
    if gold is None:
        return Finding("unclear", "No verdict on quality: nothing but the reward that was trained on measures answers.")
    if gold["n"] < FEW_PROMPTS:
        return Finding(
            "unclear",
            f"Too little evidence: gold compares {gold['n']} prompts, and a verdict takes {FEW_PROMPTS}. "
            f"Policy minus SFT is {_signed(gold)}.",
        )
    said = f"{_signed(gold)} over {gold['n']} prompts ({p_text(gold['p'])})"
    words = {1: "is better than SFT", -1: "is worse than SFT", 0: "cannot be told from SFT"}[_side(gold)]
    return Finding(_TONES[_side(gold)], f"The policy {words} by gold: {said}.")


def _length(found: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Finding]:
    """Whether a gain is one of length alone."""
    gold = changes.get("gold")
    equal = found.get("differences", {}).get("policy_minus_sft_at_equal_length", {}).get("gold")
    if gold is None or equal is None or _side(gold) <= 0:
        return []
    if _side(equal) > 0:
        return [Finding("good", f"The gain is not one of length: at equal length it is {_signed(equal)}.")]
    return [Finding("unclear", f"The gain may be one of length: at equal length gold differs by {_signed(equal)}.")]


def _proxy(changes: Mapping[str, Any]) -> list[Finding]:
    """Whether gold followed the score."""
    gold, reward = changes.get("gold"), changes.get("reward")
    if reward is None:
        return []
    if _side(reward) > 0:
        follows = gold is not None and _side(gold) > 0
        if gold is None or follows:
            return [Finding("good" if follows else "plain", f"The reward that RL raises rose by {_signed(reward)}.")]
        return [
            Finding(
                "bad",
                f"The reward that RL raises rose by {_signed(reward)}, and gold did not follow: "
                "the reward model is a poor guide, or is exploited.",
            )
        ]
    return [Finding("unclear", f"The reward that RL raises did not clearly rise: {_signed(reward)}.")]


def _distance(found: Mapping[str, Any], dev: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """How far from SFT the policy is, and of which step it is."""
    kl = found.get("policy", {}).get("kl")
    said = [] if kl is None else [Finding("plain", f"The policy is {_plain(kl)} nats a response from SFT (KL).")]
    best = [line["rl_eval/best_step"] for line in dev if line.get("rl_eval/best_step") is not None]
    if best:
        said.append(Finding("plain", f"The policy is that of step {best[-1]:.0f}, the best on dev prompts."))
    return said


def _course(peak: Peak | None, steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What gold did over the steps of `rl`."""
    if peak is None:
        if not any(line.get("rl/gold/mean") is not None for line in steps):
            return []
        return [Finding("unclear", f"Fewer than {FEW_STEPS} steps of RL: too few to look for a peak of gold.")]
    first, best, last = (f"{value:.3f}" for value in peak.gold)
    if peak.over_optimised:
        at, end = peak.kl
        kl = "" if at is None or end is None else f", at a KL of {at:.1f} nats and {end:.1f} nats"
        text = (
            f"Over-optimised from step {peak.step} on: by step {peak.last_step} gold fell from {best} to {last} "
            f"({peak.fell:.1f} standard errors) while the score rose from {peak.score[0]:.3f} to "
            f"{peak.score[1]:.3f}{kl}. The limit is {ERRORS_APART:g} standard errors."
        )
        return [Finding("bad", text)]
    if peak.fell > ERRORS_APART:
        text = f"Gold fell after step {peak.step}, from {best} to {last}, and the score did not rise: no exploitation."
        return [Finding("bad", text)]
    span = f"from step {peak.first_step} to {peak.last_step} gold went from {first} to {last}"
    if peak.gained > ERRORS_APART:
        return [Finding("good", f"No over-optimisation: {span} ({peak.gained:.1f} standard errors).")]
    return [Finding("plain", f"No over-optimisation: {span}, within {ERRORS_APART:g} standard errors.")]


def _wording(found: Mapping[str, Any]) -> list[Finding]:
    """Whether answers became poorer in words; intervals that do not overlap."""
    policy, sft, said = found.get("policy", {}), found.get("sft", {}), []
    for name, words, worse in (
        ("repetition", "repeated 4-grams of an answer", 1),
        ("distinct_2", "different 2-grams", -1),
    ):
        one, other = policy.get(name), sft.get(name)
        if one is None or other is None:
            continue
        apart = worse if one["low"] > other["high"] else -worse if one["high"] < other["low"] else 0
        if apart:
            text = f"{words.capitalize()}: {one['mean']:.1%} of the policy, {other['mean']:.1%} of SFT."
            said.append(Finding("bad" if apart > 0 else "good", text.replace("%", " %")))
    return said


def _dev(dev: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The course of gold on dev prompts, before there is an evaluation."""
    known = [line for line in dev if line.get("rl_eval/gold") is not None]
    if len(known) < 2:
        return []
    a, b = known[0], known[-1]
    text = (
        f"So far, on {b['rl_eval/prompts']:.0f} dev prompts: gold {a['rl_eval/gold']:.3f} at step {a['step']}, "
        f"{b['rl_eval/gold']:.3f} at step {b['step']}."
    )
    return [Finding("plain", text)]


def _accuracy(result: Mapping[str, Any]) -> Finding:
    """How well the reward model orders pairs that it has not seen."""
    own, rivals = result["accuracy"]["reward_model"], unbeaten(result)
    share = f"{100 * own['mean']:.1f} % [{100 * own['low']:.1f}, {100 * own['high']:.1f}]"
    text = f"The reward model orders {share} of {result['pairs']} held-out pairs rightly"
    if own["low"] <= 0.5:
        return Finding("bad", f"{text}, which is not told from chance.")
    if rivals:
        return Finding("unclear", f"{text}, not clearly more than: {', '.join(rivals)}.")
    return Finding("good", f"{text}, clearly more than length and the SFT model's log-probs.")


def _figures(found: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Figure]:
    policy = found.get("policy", {})
    wanted: list[tuple[str, Numbers | None, dict[str, Any]]] = [
        ("gold, policy − SFT", changes.get("gold"), {"neutral": 0.0}),
        ("wins over SFT by gold", policy.get("gold_win_rate_vs_sft"), {"neutral": 0.5, "percent": True}),
        ("reward, policy − SFT", changes.get("reward"), {"neutral": 0.0}),
        ("KL to SFT", policy.get("kl"), {"unit": "nats per response"}),
    ]
    return [
        Figure(words, v["mean"], v["low"], v["high"], p=v.get("p"), **more)
        for words, v, more in wanted
        if v is not None
    ]


_TONES: dict[int, Tone] = {1: "good", -1: "bad", 0: "unclear"}


def _side(value: Numbers) -> int:
    """1 if a difference is clearly above 0, -1 if it is clearly below, 0 if it is not told from 0."""
    if value.get("p", 0.0) >= ALPHA:
        return 0
    return 1 if value["low"] > 0 else -1 if value["high"] < 0 else 0


def _signed(value: Numbers) -> str:
    form = f"+z.{decimals([value['mean']])}f"
    mean, low, high = (format(value[key], form).replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _plain(value: Numbers) -> str:
    return _signed(value).replace("+", "")
