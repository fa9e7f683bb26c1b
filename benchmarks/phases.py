"""Where a second goes: the phases of a PPO step, ours and TRL's, as stacked bars (from the figures of `ppo_step`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.ppo_step import PHASES
from benchmarks.results import RESULTS, ROOT, Measurement

FIGURE = ROOT / "docs" / "figures" / "bench" / "phases.png"


def draw(phases: Mapping[str, Mapping[str, Measurement]], path: Path) -> None:
    """A bar a contestant and case, median seconds of each phase."""
    bars = [(case, name, seconds) for case, contestants in phases.items() for name, seconds in contestants.items()]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.45 * len(bars)), layout="constrained")
    # The two contestants of a case stand together.
    places = [-(i + 0.5 * (i // 2)) for i in range(len(bars))]
    left = [0.0] * len(bars)
    for number, phase in enumerate(phase for phase in PHASES if phase != "rest"):
        widths = [seconds.get(phase, 0.0) for _, _, seconds in bars]
        axes.barh(places, widths, left=left, height=0.8, label=phase, color=plt.get_cmap("tab10")(number))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:.1f} s", va="center", fontsize=8)
    axes.set_yticks(places, [f"{case}\n{name}" for case, name, _ in bars], fontsize=8)
    axes.set_xlim(0, max(left) * 1.1)
    axes.set_xlabel("seconds of a step of 64 samples (medians)")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.12 - 0.3 / len(bars)), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="does nothing: there is nothing to measure")
    if not parser.parse_args().quick:
        draw(json.loads((RESULTS / "ppo_step.json").read_text(encoding="utf-8"))["phases"], FIGURE)
