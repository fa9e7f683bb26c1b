"""The warnings of a run: of each, when it began, how far it went, and whether it lasts.

`Watch` follows the steps of a stage. A warning is said when it begins, and again only if it comes back after `QUIET`
steps without it. Example with a limit of 30 for the KL:

    step            1   2   3   4   5   6
    rl/kl          10  20  40  45  20  50
    said                    x
    shown           steps 3 to 6 (3 of them), 40 at first, 50 at last, limit 30
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rayrlhf.config import Config
from rayrlhf.reports.alarms import GOLD_DROP, STEPS_WITHOUT_SPREAD, Found, alarms
from rayrlhf.runs.metrics import WARNINGS
from rayrlhf.runs.stages import STAGES

QUIET = 10
"""Steps after which a warning that comes back is said again: a value that swings about its limit says it once."""


@dataclass
class Warned:
    """One warning of a stage."""

    stage: str
    key: str
    """As in `Found`; empty for a warning that is not about a step's metrics."""
    text: str
    """With the numbers of the first step."""
    limit: float | None = None
    first: int | None = None
    """The step in which it began; None if it is not about a step."""
    last: int | None = None
    steps: int = 1
    """How many steps it is about."""
    value: float | None = None
    """In the first step; None where there is no one number."""
    latest: float | None = None
    """In the last one."""

    @property
    def where(self) -> str:
        """`rl step 3`, `rl steps 3 to 6 (3 of them)`, or the stage alone."""
        if self.first is None or self.last is None:
            return self.stage
        if self.first == self.last:
            return f"{self.stage} step {self.first}"
        some = "" if self.steps == self.last - self.first + 1 else f" ({self.steps} of them)"
        return f"{self.stage} steps {self.first} to {self.last}{some}"

    @property
    def numbers(self) -> str:
        """`max_kl 30, 40 at first, 50 at last`; empty where no number is limited."""
        if self.limit is None or self.value is None or self.latest is None:
            return ""
        if self.first == self.last:
            return f"{self.key} {self.limit:g}, {self.value:.3g} here"
        return f"{self.key} {self.limit:g}, {self.value:.3g} at first, {self.latest:.3g} at last"

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.where}: {self.text}" + (f" ({self.numbers})" if self.numbers else "")


class Watch:
    """What the steps of one stage warn of. It is given their lines of metrics.jsonl, one after the other."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.found: dict[str, Warned] = {}
        """By key, in the order in which they began."""
        self.said: set[str] = set()
        """The texts of all warnings that began."""
        self.reason_to_stop: str | None = None
        """Why the stage has to stop after the last step, and what to do; None if it may go on."""
        self._start: dict[str, Any] = {}
        self._without_spread = 0
        self._gold = GoldAgainstScore(config.alarms.gold_window, config.rl.samples_per_prompt)

    def add(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that begin with this line. Several lines may be about one step."""
        for name, value in line.items():
            if value is not None:
                self._start.setdefault(name, value)
        found = alarms({**line, **self._history(line)}, self.config, self._start)
        self.reason_to_stop = next((f"{each.text}; {each.remedy}" for each in found if each.remedy), None)
        begun = [each.text for each in found if self._begins(line, each)]
        self.said.update(begun)
        return begun

    def _begins(self, line: Mapping[str, Any], found: Found) -> bool:
        step, before = line["step"], self.found.get(found.key)
        if before is None or before.last is None:
            self.found[found.key] = Warned(
                line["stage"], found.key, found.text, found.limit, step, step, 1, found.value, found.value
            )
            return True
        quiet = step - before.last > QUIET
        before.steps += step != before.last
        before.last, before.latest = step, found.value
        return quiet

    def _history(self, line: Mapping[str, Any]) -> dict[str, float | None]:
        """Measures of this step that earlier steps are needed for."""
        mean, spread = line.get("rl/score/mean"), line.get("rl/score/std")
        if mean is None or spread is None:
            return {}
        # A standard deviation of equal scores is a difference of two large numbers, not always 0.
        self._without_spread = self._without_spread + 1 if spread <= 1e-6 * max(1.0, abs(mean)) else 0
        return {STEPS_WITHOUT_SPREAD: float(self._without_spread), GOLD_DROP: self._gold.drop(line)}


class _Mean(NamedTuple):
    """A mean with the square of its standard error."""

    value: float
    variance: float


class GoldAgainstScore:
    """How far gold fell below its best window of steps while the score rose.

    The proxy is over-optimised where it rises and gold falls (Gao et al. 2023). Both are averaged over the last
    `window` steps, and compared with the earlier window in which gold was highest. Windows do not overlap.
    """

    def __init__(self, window: int, samples_per_prompt: int) -> None:
        """`samples_per_prompt` responses share a prompt, and count as one in standard errors, which errs upwards."""
        self.window, self.samples = window, samples_per_prompt
        self._steps: list[tuple[_Mean, _Mean]] = []
        """Gold and score of the last two windows."""
        self._best: tuple[_Mean, _Mean] | None = None

    def drop(self, line: Mapping[str, Any]) -> float | None:
        """Standard errors of the difference by which gold fell, or by which the score rose if that is less.

        0 if one of them did not; None as long as there are no two windows.
        """
        names = [f"rl/{of}/{part}" for of in ("gold", "score") for part in ("mean", "std")]
        known = [line.get(name) for name in (*names, "rl/responses")]
        if None in known:
            return None
        gold, gold_std, score, score_std, responses = (float(value) for value in known if value is not None)
        prompts = max(1.0, responses / self.samples)
        self._steps.append((_Mean(gold, gold_std**2 / prompts), _Mean(score, score_std**2 / prompts)))
        del self._steps[: -2 * self.window]
        if len(self._steps) < 2 * self.window:
            return None
        earlier, now = _window(self._steps[: self.window]), _window(self._steps[self.window :])
        if self._best is None or earlier[0].value > self._best[0].value:
            self._best = earlier
        fell, rose = _errors_apart(self._best[0], now[0]), _errors_apart(now[1], self._best[1])
        return max(0.0, min(fell, rose))


def _window(steps: Sequence[tuple[_Mean, _Mean]]) -> tuple[_Mean, _Mean]:
    gold, score = (
        _Mean(sum(m.value for m in each) / len(each), sum(m.variance for m in each) / len(each) ** 2)
        for each in zip(*steps, strict=True)
    )
    return gold, score


def _errors_apart(high: _Mean, low: _Mean) -> float:
    """How many standard errors of their difference `high` is above `low`."""
    error = math.sqrt(high.variance + low.variance)
    difference = high.value - low.value
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


def warnings_of(lines: Iterable[Mapping[str, Any]], config: Config | None) -> list[Warned]:
    """All warnings of a run, in the order of its stages and of the steps in which they began.

    Limits are those of `config`: a run that was watched with others also has what was said then.

    Args:
        lines: of metrics.jsonl, as `rayrlhf.runs.metrics.read_metrics` gives them.
        config: of the run; None if it cannot be read any more, and then there is only what was said at the time.
    """
    watches: dict[str, Watch] = {}
    said: dict[tuple[str, str], Warned] = {}
    names = list(STAGES)
    for line in lines:
        # The lines of `run` have the number of the stage that they are about in place of a step.
        of_run = line["stage"] == "run" and line["step"] < len(names)
        stage, step = (names[line["step"]], None) if of_run else (line["stage"], line["step"])
        if step is not None and config is not None:
            watches.setdefault(stage, Watch(config)).add(line)
        for text in line.get(WARNINGS, ()):
            before = said.setdefault((stage, text), Warned(stage, "", text, first=step, last=step, steps=0))
            before.last, before.steps = step, before.steps + 1
    found = [warned for watch in watches.values() for warned in watch.found.values()]
    found += [
        warned for (stage, text), warned in said.items() if stage not in watches or text not in watches[stage].said
    ]
    order = {name: number for number, name in enumerate(names)}
    return sorted(found, key=lambda each: (order.get(each.stage, len(order)), each.first or 0))
