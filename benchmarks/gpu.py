"""On a GPU: the learner's update in bfloat16 against bare torch, memory, and the newest OpenRLHF if it is installed."""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.harness import Child, alternate, column, main
from benchmarks.learner import CASES, Learner
from benchmarks.results import Comparison, Fact, Measurement, Result
from benchmarks.workload import write_reward_model


class OnGPU(Learner):
    """`Learner` with the peak of allocated memory."""

    def run(self, turn: int) -> Measurement:
        torch.cuda.reset_peak_memory_stats()
        return super().run(turn) | {"GiB": torch.cuda.max_memory_allocated() / 2**30}


def run(quick: bool) -> Result:
    if not torch.cuda.is_available():
        return Result({}, not_run="no GPU")
    installed = find_spec("openrlhf") is not None
    result = Result(
        {
            "learner": "bfloat16 autocast over float32 weights, 64 samples of 48 tokens, one PPO epoch",
            "OpenRLHF": "installed, not compared yet" if installed else "not run: not installed",
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        reward_model = write_reward_model(Path(directory) / "reward_model")
        for name, lengths, samples in CASES:
            child = partial(Child, OnGPU, reward_model, lengths, samples, "cuda", "bfloat16", threads=2)
            found = alternate({name: child}, range(1 if quick else 5))[name]
            result.comparisons.append(
                Comparison(
                    f"{name}: `PPO.update`", "tokens/s", column(found, "update"), column(found, "bare"),
                    "bare torch forward + backward", at_least=0.9,
                )
            )  # fmt: skip
            result.facts.append(Fact(f"{name}: `PPO.update`", "TFLOP/s", [x / 1e3 for x in column(found, "GFLOP/s")]))
            result.facts.append(Fact(f"{name}: peak memory of a step", "GiB", column(found, "GiB")))
    return result


if __name__ == "__main__":
    main("gpu")
