"""The verdict: each rule on numbers made by hand, on both sides of its limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayrlhf.reports.peak import ERRORS_APART, FEW_STEPS, peak_of_gold
from rayrlhf.reports.verdict import FEW_PROMPTS, Figure, Verdict, judge


def number(mean: float, low: float, high: float, n: int = 233, **more: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "n": n, **more}


def evaluation(gold: dict[str, float] | None, reward: dict[str, float] | None = None, **policy: Any) -> dict[str, Any]:
    return {"policy": policy, "sft": {}, "differences": {"policy_minus_sft": {"gold": gold, "reward": reward}}}


def steps(gold: list[float], score: list[float], std: float = 0.1, responses: float = 64) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "rl/gold/mean": g, "rl/gold/std": std, "rl/score/mean": s, "rl/score/std": std,
            "rl/responses": responses, "rl/kl": 0.5 * step,
        }
        for step, (g, s) in enumerate(zip(gold, score, strict=True), start=1)
    ]  # fmt: skip


def texts(verdict: Verdict) -> str:
    return "\n".join(finding.text for finding in verdict.findings)


@pytest.mark.parametrize(
    ("gold", "tone", "words"),
    [
        (number(0.019, 0.010, 0.028, p=0.0004), "good", "better than SFT by gold: +0.019 [+0.010, +0.028] over 233"),
        (number(-0.02, -0.03, -0.01, p=0.002), "bad", "worse than SFT by gold: −0.020 [−0.030, −0.010]"),
        (number(0.01, -0.001, 0.02, p=0.08), "unclear", "cannot be told from SFT by gold"),
        (number(0.042, 0.007, 0.085, p=0.069), "unclear", "cannot be told from SFT by gold"),  # the test says otherwise
        (number(0.042, 0.007, 0.085, p=0.049), "good", "better than SFT by gold"),
        (number(0.5, 0.4, 0.6, n=FEW_PROMPTS - 1, p=0.001), "unclear", "Too little evidence: gold compares 29 prompts"),
        (number(0.5, 0.4, 0.6, n=FEW_PROMPTS, p=0.001), "good", "better than SFT"),
        (None, "unclear", "No verdict on quality"),
    ],
)
def test_the_headline_follows_the_interval_of_gold(gold: Any, tone: str, words: str) -> None:
    verdict = judge(evaluation(gold), [])
    assert verdict.tone == tone and words in verdict.headline


def test_without_an_evaluation_or_a_policy_there_is_no_verdict() -> None:
    dev = [{"step": s, "rl_eval/gold": 0.1 + 0.01 * s, "rl_eval/prompts": 64.0} for s in (0, 10)]
    verdict = judge(None, [], dev)
    assert verdict.tone == "unclear" and "not been evaluated" in verdict.headline
    assert texts(verdict) == "So far, on 64 dev prompts: gold 0.100 at step 0, 0.200 at step 10."
    assert not judge(None, [], dev[:1]).findings
    assert "no policy" in judge({"sft": {}, "differences": {}}, []).headline


def test_a_gain_of_length_alone_is_named() -> None:
    found = evaluation(number(0.02, 0.01, 0.03, p=0.001))
    equal = found["differences"]["policy_minus_sft_at_equal_length"] = {"gold": number(0.01, 0.002, 0.02)}
    assert "not one of length: at equal length it is +0.010" in texts(judge(found, []))
    equal["gold"] = number(0.0, -0.01, 0.01)
    assert "may be one of length" in texts(judge(found, []))
    # There is no gain to explain.
    found["differences"]["policy_minus_sft"]["gold"] = number(0.0, -0.01, 0.01, p=0.9)
    assert "of length" not in texts(judge(found, []))


def test_a_proxy_that_rises_alone_is_bad_news() -> None:
    rose, flat = number(1.0, 0.5, 1.5), number(0.0, -0.1, 0.1, p=0.9)
    alone = judge(evaluation(flat, rose), []).findings[0]
    assert alone.tone == "bad" and "gold did not follow" in alone.text
    both = judge(evaluation(number(0.1, 0.05, 0.2, p=0.001), rose), []).findings[0]
    assert both.tone == "good" and both.text == "The reward that RL raises rose by +1.000 [+0.500, +1.500]."
    assert judge(evaluation(None, rose), []).findings[0].tone == "plain"
    assert "did not clearly rise" in judge(evaluation(flat, flat), []).findings[0].text


def test_distance_and_step_of_the_policy() -> None:
    found = evaluation(number(0.0, -0.1, 0.1, p=0.9), kl=number(4.25, 4.0, 4.5))
    said = texts(judge(found, [], [{"step": 20, "rl_eval/best_step": 15.0}]))
    assert "The policy is 4.250 [4.000, 4.500] nats a response from SFT (KL)." in said
    assert "The policy is that of step 15, the best on dev prompts." in said


def test_over_optimised_from_the_middle_of_golds_best_window() -> None:
    """24 steps, windows of four. Gold peaks in steps 9 to 12; its standard error there is 0.1 / sqrt(64 * 4)."""
    gold = [0.1] * 4 + [0.2] * 4 + [0.3] * 4 + [0.2] * 8 + [0.15] * 4
    lines = steps(gold, [0.1 * step for step in range(24)])
    peak = peak_of_gold(lines)
    assert peak is not None
    assert (peak.first_step, peak.step, peak.last_step) == (1, 11, 24)
    assert peak.gold == pytest.approx((0.1, 0.3, 0.15)) and peak.score == pytest.approx((0.95, 2.15))
    assert peak.kl == pytest.approx((0.5 * 10.5, 0.5 * 22.5))
    error = math.sqrt(2) * 0.1 / math.sqrt(64 * 4)
    assert peak.fell == pytest.approx(0.15 / error) and peak.rose == pytest.approx(1.2 / error)
    assert peak.over_optimised
    (finding,) = judge(None, lines).findings
    assert finding.tone == "bad"
    assert finding.text == (
        f"Over-optimised from step 11 on: by step 24 gold fell from 0.300 to 0.150 ({0.15 / error:.1f} standard "
        "errors) while the score rose from 0.950 to 2.150, at a KL of 5.2 nats and 11.2 nats. The limit is 3 standard "
        "errors."
    )


def test_noise_is_no_peak() -> None:
    """The same course, but with so much noise that gold's fall is within three standard errors."""
    gold = [0.1] * 4 + [0.2] * 4 + [0.3] * 4 + [0.2] * 8 + [0.15] * 4
    score = [0.1 * step for step in range(24)]
    error = 0.15 / ERRORS_APART  # of the difference
    std = error / math.sqrt(2) * math.sqrt(64 * 4)
    for factor, over in ((0.99, True), (1.01, False)):
        lines = steps(gold, score, std=factor * std)
        peak = peak_of_gold(lines)
        assert peak is not None and peak.over_optimised is over
        assert ("Over-optimised" in judge(None, lines).findings[0].text) is over
    # Four responses to one prompt count as one.
    doubled = peak_of_gold(steps(gold, score, std=std), samples_per_prompt=4)
    assert doubled is not None and doubled.fell == pytest.approx(ERRORS_APART / 2)


def test_gold_that_falls_with_the_score_is_not_exploitation() -> None:
    gold = [0.3] * 12 + [0.1] * 12
    (finding,) = judge(None, steps(gold, gold)).findings
    assert finding.tone == "bad" and "the score did not rise: no exploitation" in finding.text


def test_gold_that_rises_to_the_end() -> None:
    gold = [0.01 * step for step in range(24)]
    (finding,) = judge(None, steps(gold, gold)).findings
    assert finding.tone == "good"
    assert finding.text.startswith("No over-optimisation: from step 1 to 24 gold went from 0.015 to 0.215 (")
    (flat,) = judge(None, steps([0.2] * 24, gold)).findings
    assert flat.tone == "plain" and "within 3 standard errors" in flat.text


def test_few_steps_or_no_gold_say_nothing_of_a_peak() -> None:
    few = steps([0.1] * (FEW_STEPS - 1), [0.1] * (FEW_STEPS - 1))
    assert peak_of_gold(few) is None
    (finding,) = judge(None, few).findings
    assert finding.tone == "unclear" and "too few" in finding.text
    assert judge(None, [{"step": step, "rl/kl": 1.0} for step in range(40)]).findings == ()


def test_answers_that_grow_poorer() -> None:
    found = evaluation(None)
    found["sft"] |= {"repetition": number(0.05, 0.04, 0.06), "distinct_2": number(0.5, 0.45, 0.55)}
    found["policy"] |= {"repetition": number(0.3, 0.25, 0.35), "distinct_2": number(0.4, 0.35, 0.46)}
    (finding,) = judge(found, []).findings  # the intervals of distinct-2 overlap
    assert finding.tone == "bad"
    assert finding.text == "Repeated 4-grams of an answer: 30.0 % of the policy, 5.0 % of SFT."
    found["policy"] |= {"distinct_2": number(0.7, 0.6, 0.8), "repetition": number(0.01, 0.0, 0.02)}
    assert [each.tone for each in judge(found, []).findings] == ["good", "good"]


def test_the_reward_model_is_held_against_chance_and_length() -> None:
    def said(low: float, over_length: float) -> tuple[str, str]:
        result = {
            "pairs": 300,
            "accuracy": {"reward_model": number(0.62, low, 0.66)},
            "reward_model_minus": {"longer": number(0.1, over_length, 0.2)},
        }
        (finding,) = judge(None, [], reward_model=result).findings
        return finding.tone, finding.text

    assert said(0.58, 0.02)[0] == "good"
    assert said(0.58, 0.0) == (
        "unclear",
        "The reward model orders 62.0 % [58.0, 66.0] of 300 held-out pairs rightly, not clearly more than: longer "
        "answer.",
    )
    assert said(0.5, 0.02)[0] == "bad"


def test_figures_have_their_own_tone() -> None:
    found = evaluation(
        number(0.019, 0.010, 0.028, p=0.001),
        number(-1.0, -2.0, -0.5),
        gold_win_rate_vs_sft=number(0.55, 0.49, 0.61),
        kl=number(12.25, 11.0, 13.0),
    )
    shown = [(f.words, f.tone, f.text, f.interval) for f in judge(found, []).figures]
    assert shown == [
        ("gold, policy − SFT", "good", "+0.019", "+0.010 to +0.028"),
        ("wins over SFT by gold", "unclear", "55.0 %", "49.0 % to 61.0 %"),
        ("reward, policy − SFT", "bad", "−1.000", "−2.000 to −0.500"),
        ("KL to SFT", "plain", "12.2", "11.0 to 13.0"),
    ]
    assert Figure("x", 0.5, 0.4, 0.6).text == "0.500"
    assert Figure("x", 0.5, 0.4, 0.6, neutral=0.0, p=0.06).tone == "unclear"
