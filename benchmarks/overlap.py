"""PPO that generates ahead of its learner against PPO in turn, on Ray, with the same cores pinned both ways.

The learner has one core, generator and scorer share the other one. With L seconds of learning a step and G of loading
weights, generating and scoring, in turn a step takes L + G; ahead it cannot take less than max(L, G).
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ENVIRONMENT, Child, alternate, column, main
from benchmarks.results import Comparison, Fact, Measurement, Result
from benchmarks.workload import EQUAL, MODEL, prompts, write_reward_model
from rayrlhf.config import Config
from rayrlhf.config_resources import GeneratorConfig, ResourcesConfig
from rayrlhf.config_rl import PPOConfig
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Sampling

STEPS, PROMPTS, RESPONSE, EPOCHS = 6, 48, 96, 1
"""Generation and learning take about the same time."""
TIMEOUT_S = 600


def pin(pid: int, core: int) -> None:
    """All threads of a process; those that it starts later inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


class Loop:
    """A private Ray cluster with coordinator, generator and scorer; this process is the learner."""

    def __init__(self, max_staleness: int, steps: int, prompts_per_step: int, reward_model: str) -> None:
        import ray

        from actors.pools.remote import Remote, wait
        from actors.rollouts.coordinator import Coordinator
        from actors.rollouts.coordinator_link import CoordinatorLink, Setup
        from actors.training.rl import GeneratorLink
        from rayrlhf.algorithms.registry import make_trainer
        from rayrlhf.models.forward import Forward
        from rayrlhf.models.ranks import Ranks

        os.environ.update(ENVIRONMENT)
        learner_core, rollout_core = sorted(os.sched_getaffinity(0))[:2]
        self.directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds Unix sockets
        ray.init(
            address="local", num_cpus=3, include_dashboard=False, _temp_dir=self.directory, log_to_driver=False,
            object_store_memory=2**28,
        )  # fmt: skip
        tokenizer = load_tokenizer(MODEL)
        config = Config(
            name="overlap",
            rl=PPOConfig(
                steps=steps, prompts_per_step=prompts_per_step, epochs=EPOCHS, max_staleness=max_staleness,
                optimizer=OptimizerConfig(lr=1e-7),
            ),
            resources=ResourcesConfig(generators=GeneratorConfig(kv_cache_mib=256)),
        )  # fmt: skip
        self.config, self.ranks = config, Ranks(threads=1)
        arguments = (config, MODEL, EQUAL + RESPONSE, tokenizer.pad_token_id, False)
        self.coordinator = Remote.spawn("coordinator", Coordinator, *arguments, local=False, options={"num_cpus": 0})
        started = self.coordinator.submit("start_generators")
        scorers = self.coordinator.call("start_scorers", reward_model, MODEL, timeout_s=TIMEOUT_S)
        for actor in [*wait([started], TIMEOUT_S)[0], *scorers]:
            pin(actor["pid"], rollout_core)
        pin(os.getpid(), learner_core)
        # PAD is never sampled, so no response ends before its 48 tokens.
        sampling = Sampling(config.rl.temperature, RESPONSE, tokenizer.pad_token_id)
        self.coordinator.call("set_prompts", prompts("equal"), sampling, timeout_s=TIMEOUT_S)
        self.policy = load_policy(MODEL)
        tokens, pad = config.rl.micro_batch_tokens, tokenizer.pad_token_id
        forward_of = partial(Forward, pad_token_id=pad, max_tokens=tokens, dtype="float32")
        self.rl = make_trainer(
            config.rl, forward_of(self.policy), forward_of(load_reward_model(reward_model)), self.ranks,
            max_response_tokens=RESPONSE, seed=0,
        )  # fmt: skip
        self.link = GeneratorLink(CoordinatorLink(self.coordinator, Setup(), config), self.ranks, self.policy)
        self.version = 0
        self.run(0)

    def run(self, turn: int) -> Measurement:
        """Medians over the steps but for the first, which nothing could be ahead of."""
        from actors.rollouts.groups import Cursor

        self.link.begin(Cursor(0))
        seconds: dict[str, list[float]] = {"step": [], "wait": [], "learn": [], "sync": []}
        for step in range(self.config.rl.steps):
            started = time.perf_counter()
            self.version = self.link.send_weights(after=self.version)
            waiting = time.perf_counter()
            batch = self.link.next_batch(step, self.version)
            learning = time.perf_counter()
            self.rl.step(batch.trajectories, step)
            ended = time.perf_counter()
            for name, value in (
                ("step", ended - started), ("sync", waiting - started), ("wait", learning - waiting),
                ("learn", ended - learning),
            ):  # fmt: skip
                seconds[name].append(value)
        return {name: statistics.mean(values[1:]) for name, values in seconds.items()}

    def close(self) -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)


def run(quick: bool) -> Result:
    turns = range(1 if quick else 3)
    steps, count = (3, 8) if quick else (STEPS, PROMPTS)
    if len(os.sched_getaffinity(0)) < 2:
        return Result({}, not_run="it needs two cores")
    with tempfile.TemporaryDirectory() as directory:
        reward_model = write_reward_model(Path(directory))
        makers: dict[str, Any] = {
            name: partial(Child, Loop, staleness, steps, count, reward_model, threads=1)
            for name, staleness in (("in turn", 0), ("ahead", 1))
        }
        found = alternate(makers, turns)
    in_turn, ahead = found["in turn"], found["ahead"]
    bounds = [max(each["learn"], each["sync"] + each["wait"]) for each in in_turn]
    speedups = [
        (each["learn"] + each["sync"] + each["wait"]) / bound for each, bound in zip(in_turn, bounds, strict=True)
    ]
    return Result(
        {
            "a step": f"{count} prompts of {EQUAL} tokens, responses of {RESPONSE}, {EPOCHS} epoch, two models",
            "cores": "one for the learner, one for generator and scorer, pinned; one thread each",
            "staleness": "0 against 1",
        },
        comparisons=[
            Comparison(
                "a step ahead, against its bound", "s", bounds, column(ahead, "step"), "max(L, G) over a step ahead",
                at_least=0.9,
            ),
            Comparison("a step in turn", "s", column(in_turn, "step"), column(ahead, "step"), "a step ahead"),
        ],
        facts=[
            Fact("L: the learner trains (in turn)", "s", column(in_turn, "learn")),
            Fact("G: it waits for weights, generation and scores (in turn)", "s", column(in_turn, "wait")),
            Fact("the bound (L + G) / max(L, G)", "times", speedups),
            Fact("the learner trains (ahead)", "s", column(ahead, "learn")),
            Fact("it waits (ahead)", "s", column(ahead, "wait")),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main("overlap")
