"""What a step's metrics warn of: one line each, with its usual cause. The limits are `config.alarms`.

This file looks at one step. `rayrlhf.reports.warnings` follows the steps, so that each warning is said when it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rayrlhf.config import Config


class Alarm(NamedTuple):
    """A limit of `AlarmsConfig`, the metric that it bounds, and the warning.

    `beyond(value, start, limit)` says whether to warn. It gets the metric's value in this step, all metrics of the
    first RL step (whose batch the SFT model sampled) and the limit.
    """

    limit: str
    metric: str
    beyond: Callable[[float, Mapping[str, Any], float], bool]
    means: str
    """The text, with the fields `value`, `start` (the same metric in the first step) and `limit`."""
    fresh_only: bool = False
    """Whether it only holds for batches whose tokens the current policy sampled."""
    remedy: str = ""
    """What to do before the run may go on; empty where it goes on anyway."""


class Found(NamedTuple):
    """Something to warn of in one step."""

    key: str
    """What tells it from other warnings: its limit in `alarms`, or what happened."""
    text: str
    value: float | None = None
    limit: float | None = None
    remedy: str = ""
    """As in `Alarm`."""


GOLD_DROP, STEPS_WITHOUT_SPREAD = "history/gold_drop", "history/steps_without_spread"
"""What earlier steps are needed for; `rayrlhf.reports.warnings` adds them to a step's metrics."""


def _above(value: float, start: Mapping[str, Any], limit: float) -> bool:
    return value > limit


def _below(value: float, start: Mapping[str, Any], limit: float) -> bool:
    return value < limit


def _below_share_of(metric: str) -> Callable[[float, Mapping[str, Any], float], bool]:
    def beyond(value: float, start: Mapping[str, Any], limit: float) -> bool:
        return start.get(metric) is not None and value < limit * start[metric]

    return beyond


def _fell(value: float, start: Mapping[str, Any], limit: float) -> bool:
    mean, deviation = start.get("rl/score/mean"), start.get("rl/score/std")
    return mean is not None and deviation is not None and value < mean - limit * deviation


ALARMS = (
    Alarm(
        "max_logprob_gap",
        "rl/logprob_gap/mean",
        _above,
        "generator and learner differ by {value:.3g} nats a token on the tokens that were sampled; usually stale "
        "weights, or another dtype or temperature on one side",
        fresh_only=True,
    ),
    Alarm(
        "max_first_ratio_off_one",
        "rl/first_ratio_off_one",
        _above,
        "the first mini-batch's ratios are off 1 by {value:.3g}; old and new log-probs are computed differently "
        "(dropout, precision): no figure of this run can be trusted until that is found",
    ),
    Alarm(
        "max_kl",
        "rl/kl",
        _above,
        "the policy is {value:.1f} nats a response from the reference (limit {limit:g}); usually it exploits the "
        "reward model: read samples, raise rl.kl.coefficient or take fewer steps",
    ),
    Alarm(
        "max_negative_kl",
        "rl/kl",
        lambda value, start, limit: value < -limit,
        "the KL to the reference is {value:.2f} nats, and a KL is never negative; usually policy and reference are "
        "read at different temperatures or in different precision",
    ),
    Alarm(
        "max_score_drop",
        "rl/score/mean",
        _fell,
        "the mean score fell to {value:.3f} from {start:.3f} at the start; usually the learning rate is too high",
    ),
    Alarm(
        "min_score_spread",
        "rl/score/std",
        _below_share_of("rl/score/std"),
        "the scores hardly differ any more (standard deviation {value:.3g}, {start:.3g} at the start); usually all "
        "answers have become the same text",
    ),
    Alarm(
        "max_steps_without_spread",
        STEPS_WITHOUT_SPREAD,
        lambda value, start, limit: value >= limit,
        "all responses of {value:.0f} steps in a row scored the same, so that there was nothing to learn from them",
        remedy="if rl/eos_rate is low, all of them score rl.missing_eos_reward: raise data.max_response_tokens, train "
        "sft longer, or set rl.missing_eos_reward=null; otherwise look at what `rewards` say of some responses. To go "
        "on all the same: alarms.max_steps_without_spread=null",
    ),
    Alarm(
        "max_gold_drop",
        GOLD_DROP,
        _above,
        "gold fell {value:.1f} standard errors below its best steps while the score rose: the reward model is "
        "exploited; keep the best policy (rl.select: gold), raise rl.kl.coefficient or take fewer steps",
    ),
    Alarm(
        "max_repetition",
        "rl/repetition",
        _above,
        "{value:.0%} of the 4-grams of an answer repeat one before (limit {limit:.0%}); usually the reward model likes "
        "loops: read samples, raise rl.kl.coefficient or take fewer steps",
    ),
    Alarm(
        "min_distinct_2",
        "rl/distinct_2",
        _below_share_of("rl/distinct_2"),
        "only {value:.3f} of all 2-grams of the step's answers are different ones, {start:.3f} at the start; usually "
        "the policy collapses onto a few phrases: raise rl.kl.coefficient or lower the learning rate",
    ),
    Alarm(
        "max_common_opening",
        "rl/common_opening",
        _above,
        "{value:.0%} of the answers begin with the same four words (limit {limit:.0%}); usually the reward model likes "
        "a stock phrase: read samples",
    ),
    Alarm(
        "min_length",
        "rl/length/mean",
        _below_share_of("rl/length/mean"),
        "responses shrank to {value:.1f} tokens from {start:.1f} at the start; usually the reward model prefers "
        "short answers, or ending early escapes the KL penalty",
    ),
    Alarm(
        "min_eos_rate",
        "rl/eos_rate",
        _below,
        "only {value:.0%} of the responses end with EOS; usually data.max_response_tokens is too small, or "
        "rl.missing_eos_reward too mild for answers that ramble",
    ),
    Alarm(
        "min_entropy",
        "rl/entropy",
        _below_share_of("rl/entropy"),
        "the policy's entropy fell to {value:.3f} nats a token from {start:.3f}; usually it has collapsed onto a few "
        "answers: raise rl.kl.coefficient or lower the learning rate",
    ),
    Alarm(
        "max_clip_fraction",
        "rl/clip_fraction",
        _above,
        "{value:.0%} of the tokens were clipped; usually the learning rate is too high, or rl.epochs too many "
        "(rl.max_approx_kl ends them early)",
    ),
    Alarm(
        "min_over_length",
        "reward_model/minus_length",
        lambda value, start, limit: value <= limit,
        "the reward model orders held-out pairs no better than the answers' length does ({value:+.3f} of the pairs); "
        "rl against it will find longer or shorter answers: collect more or cleaner comparisons",
    ),
)


def alarms(metrics: Mapping[str, Any], config: Config, start: Mapping[str, Any]) -> list[Found]:
    """What to warn of in one step (a line of metrics.jsonl).

    Args:
        metrics: the step's metrics; a value that was not finite is None.
        config: its `alarms` section holds the limits.
        start: metrics of the stage's first step, this step's own in the first.
    """
    found = []
    if metrics.get("non_finite"):
        names = ", ".join(metrics["non_finite"])
        found.append(Found("not finite", f"not finite: {names}; usually a learning rate that is too high"))
    for alarm in ALARMS:
        value, limit = metrics.get(alarm.metric), getattr(config.alarms, alarm.limit)
        if alarm.fresh_only and metrics.get("rollout/staleness/max"):
            continue
        if value is not None and limit is not None and alarm.beyond(value, start, limit):
            text = alarm.means.format(value=value, start=start.get(alarm.metric), limit=limit)
            found.append(Found(alarm.limit, text, value, limit, alarm.remedy))
    found += _rewards_that_pay(metrics, config, start)
    for metric, value in metrics.items():
        if metric.startswith("rl/prompts_cut/") and value:
            found.append(Found(metric, cut_prompts(metric.rpartition("/")[2], value, metrics["rl/responses"]), value))
    for metric, text in _EVENTS.items():
        if value := metrics.get(metric):
            found.append(Found(metric, text.format(value=value), value))
    return found


_EVENTS = {
    "rl/judge_unusable": "{value:.0f} question(s) to judges got no usable reply and count as 0; the reward's `body` "
    "can have the judge reply with nothing else (docs/extending.md)",
    "rollout/replacements": "{value:.0f} actor(s) died and were replaced in this step; their logs say why (often "
    "memory)",
}
"""By metric what to say of a number that should be 0."""


def cut_prompts(reward: str, cut: float, responses: float) -> str:
    """What to say of a reward model from elsewhere that did not read `cut` of the prompts whole."""
    return (
        f"reward {reward!r} read {cut:.0f} of {responses:.0f} responses without the beginning of their prompts, which "
        "do not fit its context; lower data.max_prompt_tokens, or take a model with a longer one"
    )


def _rewards_that_pay(metrics: Mapping[str, Any], config: Config, start: Mapping[str, Any]) -> list[Found]:
    """Rewards that fall while their sum rises: others grow at their cost."""
    limit, score, first = config.alarms.max_reward_drop, metrics.get("rl/score/mean"), start.get("rl/score/mean")
    if limit is None or score is None or first is None or score <= first:
        return []
    found = []
    for metric in (name for name in metrics if name.startswith("rl/rewards/")):
        name = metric.rpartition("/")[2]
        value, before, spread = metrics[metric], start.get(metric), start.get(f"rl/reward_std/{name}")
        if value is None or before is None or spread is None:
            continue
        if value < before - limit * spread:
            text = (
                f"reward {name!r} fell to {value:.3f} from {before:.3f} at the start while the score rose: another "
                "reward pays for it; change the weights in `rewards`, or read samples"
            )
            found.append(Found(f"max_reward_drop of {name}", text, value, limit))
    return found
