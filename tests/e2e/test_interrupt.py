"""PPO ahead of the learner, ended by SIGTERM, continued by the same command, and ended by Ctrl-C: both save.

    rayrlhf rl         step 1, 2, ... | SIGTERM: a checkpoint
    the same command                   | the steps after it ... | Ctrl-C: a checkpoint

The run has more steps than anybody waits for, and each part of the timeline lasts until its effect has been seen. So
nothing has to happen in time.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rayrlhf.runs.metrics import read_lines, read_metrics
from tests.leftovers import held, named
from tests.sockets import beyond_loopback, listening

STEPS = 10_000
INTERRUPTED = "interrupted: finished stages and checkpoints are kept; the same command continues\n"


class Run(NamedTuple):
    """A run before PPO or in the middle of it, and the command that goes on with it."""

    run: Path
    arguments: list[str]
    """What follows `rayrlhf`."""
    listening: set[str] | None = None
    """Addresses on which processes of the first command took connections."""
    left_by_a_kill: set[str] | None = None
    """Names in shared memory that its processes held."""


def rl_lines(run: Path) -> list[dict[str, Any]]:
    """What PPO has written so far, line by line."""
    lines = [json.loads(line) for line in read_lines(run).splitlines()]
    return [line for line in lines if line["stage"] == "rl"]


def end(command: Any, number: signal.Signals) -> None:
    """End the command as a terminal (SIGINT) or whoever started it (SIGTERM) does; nothing of it is left."""
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)  # to the whole group
    else:
        os.kill(command.process.pid, number)
    outcome = command.wait()
    assert outcome.code == 130, outcome.err
    assert outcome.err == INTERRUPTED
    command.wait_until(lambda: command.processes() == {}, "its processes end", running=False)


def ahead(finished: Any, runs_dir: Path) -> Run:
    """The command that goes on with a copy of the finished run, as it was before PPO, ahead of the learner."""
    run: Path = finished.copy_before_rl(runs_dir)
    changes = [f"runs_dir={run.parent}", f"rl.steps={STEPS}", f"rl.checkpoint_every={STEPS}", "rl.max_staleness=1"]
    return Run(run, ["rl", *finished.arguments, *changes, "resources.generators.cpus=0.25"])


def is_ahead(run: Path) -> bool:
    return any(line["rollout/staleness/max"] == 1 for line in rl_lines(run))


@pytest.fixture(scope="module")
def ended(finished: Any, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = ahead(finished, tmp_path_factory.mktemp("runs"))
    command = start("rayrlhf", *found.arguments)
    command.wait_until(lambda: is_ahead(found.run), "generation is ahead of the learner")
    pids = [*command.processes()]
    seen = found._replace(listening=listening(pids), left_by_a_kill=named(held(pids)))
    assert held(pids), "Ray's objects at least are there"
    end(command, signal.SIGTERM)
    return seen


def test_the_steps_of_a_run_that_is_ahead(ended: Run) -> None:
    lines = read_metrics(ended.run, "rl")
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
    assert lines[0]["rollout/staleness/max"] == 0 and abs(lines[0]["rl/kl"]) < 1e-3
    assert {line["rollout/staleness/max"] for line in lines} <= {0, 1}
    for line in lines:
        assert line["rl/first_ratio_off_one"] < 1e-5
        assert 0.5 < line["rl/importance_weight/mean"] < 1.5
        assert line["time/step"] == pytest.approx(line["time/sync"] + line["time/wait"] + line["time/learn"])
        assert {"idle/learner", "idle/scorer-0"} <= line.keys()


def test_all_its_processes_listen_on_the_loopback_address_only(ended: Run) -> None:
    """Whoever reached the cluster, an engine or the learner's store could run code."""
    assert ended.listening and not beyond_loopback(ended.listening)


def test_a_kill_would_have_left_nothing_in_shared_memory(ended: Run) -> None:
    """What its processes share has no name any more: the kernel frees it with the last of them."""
    assert ended.left_by_a_kill == set()


# Another start of all actors. ray/test_learner holds loops that are interrupted and continued to the last bit.
@pytest.mark.long
def test_an_interrupted_run_continues_from_its_checkpoint(ended: Run, start: Any) -> None:
    run = ended.run
    assert not (run / "policy").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".policy")]
    before = rl_lines(run)
    command = start("rayrlhf", *ended.arguments)
    command.wait_until(lambda: len(rl_lines(run)) >= len(before) + 3, "three steps more")
    end(command, signal.SIGINT)
    lines = rl_lines(run)
    assert lines[: len(before)] == before
    # SIGTERM asked for a checkpoint, which was written after the last line: no step is lost, none is done again.
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
    versions = [line["rl/weight_version"] for line in lines]
    assert versions == sorted(set(versions)), versions
    # It learns with the weights that the steps before had ended with: the policy has moved away from the reference.
    assert lines[len(before)]["rl/kl_k3"] > 10 * abs(lines[0]["rl/kl_k3"])
    assert all(line["rl/first_ratio_off_one"] < 1e-5 for line in lines[len(before) :])
    newest = max((run / "checkpoints").glob("rl-*/checkpoint_*"))
    assert torch.load(newest / "state.pt", weights_only=True)["step"] == len(lines), "Ctrl-C lost steps"
    shown = [int(number) for number in re.findall(rf"^rl +(\d+)/{STEPS} ", command.wait().out, re.MULTILINE)]
    assert shown[0] == len(before) + 1


# A start of PPO and of one more generator, for what ray/test_scaling and ray/test_monitoring show in parts.
@pytest.mark.long
def test_a_run_is_scaled_up_and_down(finished: Any, start: Any, tmp_path: Path) -> None:
    run, arguments, _ = ahead(finished, tmp_path)

    def scale(count: int) -> Any:
        return start("rayrlhf", "scale", str(run), "--generators", str(count)).wait()

    before = scale(2)
    assert before.code == 2 and "scale: nobody works on" in before.err
    command = start("rayrlhf", *arguments)
    command.wait_until(lambda: is_ahead(run), "generation is ahead of the learner")
    for count in (2, 1):
        answer = scale(count)
        assert answer.code == 0, answer.err
        assert f"wanted from now on: {count} generators, 1 scorers" in answer.out
        command.wait_until(
            lambda wanted=count: rl_lines(run)[-1]["rollout/generators"] == wanted, f"{count} generators make a batch"
        )
    refused = scale(0)
    assert refused.code == 2 and "at least one is needed" in refused.err
    end(command, signal.SIGTERM)
    lines = rl_lines(run)
    assert {line["rollout/generators"] for line in lines} == {1.0, 2.0}
    assert all(line["rollout/replacements"] == 0 for line in lines)
