"""What each round of a run has come to, and whether another one is worth its cost.

Source of the two rules that stop a run: a policy whose win rate over the one before it may as well be chance has
stopped to gain; and gold that falls while the reward rises is over-optimisation (Gao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from rayrlhf.reports.evaluation import PREVIOUS
from rayrlhf.reports.results import POLICY, read_evaluation
from rayrlhf.resampling import cluster_bootstrap
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.reading import read_table, sound
from rayrlhf.runs.rounds import round_name, rounds_of

IntervalDict = Mapping[str, float]
"""`{"mean", "low", "high", "n"}`, as evaluation.json has it."""


@dataclass(frozen=True)
class HeldOut:
    """A reward model on the held-out comparisons of one round."""

    accuracy: IntervalDict
    """Share of the pairs that it orders as the labeller did, with its interval over prompts."""
    confidence: float
    """Mean over the pairs of sigmoid(|margin|): a calibrated model is right about as often as it is confident."""


@dataclass(frozen=True)
class RoundResult:
    """One round of a run, finished or not."""

    number: int
    evaluation: Mapping[str, Any] | None
    """evaluation.json; None before it is there."""
    heldout: Mapping[int, HeldOut]
    """The round's reward model, by the round whose comparisons were held out; empty without a reward model."""

    def measure(self, name: str) -> IntervalDict | None:
        """One of the policy's measures in evaluation.json."""
        found: IntervalDict | None = None if self.evaluation is None else self.evaluation["policy"].get(name)
        return found

    def win_rate(self, over: str) -> IntervalDict | None:
        """The policy's win rate over `sft` or `previous`: by gold, or by the reward where gold is not measured.

        The first round's is over the SFT model in both cases.
        """
        source = "sft" if self.number == 1 else over
        return self.measure(f"gold_win_rate_vs_{source}") or self.measure(f"win_rate_vs_{source}")

    def change(self, name: str) -> IntervalDict | None:
        """The paired difference of `gold` or `reward` to the round before, both by this round's reward model."""
        if self.evaluation is None:
            return None
        source = "sft" if self.number == 1 else PREVIOUS
        found: IntervalDict | None = self.evaluation["differences"].get(f"policy_minus_{source}", {}).get(name)
        return found


def read_rounds(run: RunFolder) -> list[RoundResult]:
    """The rounds of a run that have begun, in order."""
    return [read_round(folder, number) for number, folder in enumerate(rounds_of(run), 1)]


def read_round(folder: RunFolder, number: int) -> RoundResult:
    """What the folder of one round has so far."""
    pairs, address = folder.read(folder.heldout_pairs), folder.address_of(folder.heldout_pairs)
    heldout: dict[int, HeldOut] = {}
    if pairs is not None:
        table = read_table(pairs, address, "source", "reward_model", "prompt")
        with sound(address):
            heldout = heldout_by_round(table, number)
    return RoundResult(number, read_evaluation(folder, *POLICY), heldout)


def heldout_by_round(pairs: pa.Table, number: int) -> dict[int, HeldOut]:
    """Accuracy and confidence of a reward model on the comparisons of each round.

    Args:
        pairs: heldout_pairs.parquet. In the first round, whose comparisons have no others beside them, its `source` is
            empty.
        number: of the round whose reward model it is.
    """
    names = {round_name(each): each for each in range(1, number + 1)} | {"": 1}
    sources = np.array([names.get(source, 0) for source in pairs.column("source").to_pylist()])
    margins = pairs.column("reward_model").to_numpy()
    prompts = pairs.column("prompt").to_numpy()
    right = (np.sign(margins) + 1) / 2
    return {
        int(source): HeldOut(
            asdict(cluster_bootstrap(right[sources == source], prompts[sources == source])),
            float(expit(np.abs(margins[sources == source])).mean()),
        )
        for source in np.unique(sources)
        if source  # another run's, which `collect.earlier` of the config names
    }


def reason_to_stop(results: Sequence[RoundResult]) -> str | None:
    """Why no further round is worth its cost, in words; None if it may be.

    Args:
        results: of the finished rounds, in order.
    """
    last = results[-1]
    gold, reward = last.change("gold"), last.change("reward")
    if gold and reward and gold["high"] < 0 < reward["low"]:
        return (
            f"gold fell by {-gold['mean']:.3f} in round {last.number} while the reward rose by {reward['mean']:.3f} "
            "(both intervals exclude 0): the policy exploits its reward model"
        )
    rates = [result.win_rate(PREVIOUS) for result in results[-2:]]
    if len(rates) == 2 and all(rate is not None and rate["low"] <= 0.5 <= rate["high"] for rate in rates):
        return (
            f"in rounds {last.number - 1} and {last.number} the interval of the win rate over the round before "
            "includes 50 %: the policy has stopped getting better"
        )
    return None
