"""PPO ahead of the learner, scaled, ended by SIGTERM, continued by the same command, and ended by Ctrl-C.

    rayrlhf ppo         step 1, 2, ...  | scale 2: ... | scale 1: ... | SIGTERM: a checkpoint
    the same command                                                  | the steps after it ... | Ctrl-C

The run has more steps than anybody waits for, and each line of the timeline lasts until its effect has been seen. So
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

from rayrlhf.runs.metrics import read_lines, read_metrics

STEPS = 10_000
INTERRUPTED = "interrupted: finished stages and checkpoints are kept; the same command continues\n"


class Ended(NamedTuple):
    """The run after the first command."""

    run: Path
    arguments: list[str]
    scale: dict[str, Any]
    """What `rayrlhf scale` answered, by the number of generators; "before" is from before the run."""


def ppo_lines(run: Path) -> list[dict[str, Any]]:
    """What PPO has written so far, line by line."""
    lines = [json.loads(line) for line in read_lines(run).splitlines()]
    return [line for line in lines if line["stage"] == "ppo"]


def end(command: Any, number: signal.Signals) -> None:
    """End the command as a terminal (SIGINT) or whoever started it (SIGTERM) does; nothing of it is left."""
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)  # to the whole group
    else:
        os.kill(command.process.pid, number)
    outcome = command.wait(300)
    assert outcome.code == 130, outcome.err
    assert outcome.err == INTERRUPTED
    command.wait_until(lambda: command.processes() == {}, "its processes end", running=False)


@pytest.fixture(scope="module")
def ended(finished: Any, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    run: Path = finished.copy_before_ppo(tmp_path_factory.mktemp("runs"))
    changes = [f"runs_dir={run.parent}", f"ppo.steps={STEPS}", f"ppo.checkpoint_every={STEPS}", "ppo.max_staleness=1"]
    arguments = ["ppo", *finished.arguments, *changes, "resources.generators.cpus=0.25"]

    def scale(count: int) -> Any:
        return start("rayrlhf", "scale", str(run), "--generators", str(count)).wait(200)

    answers: dict[str, Any] = {"before": scale(2)}
    command = start("rayrlhf", *arguments)
    command.wait_until(
        lambda: any(line["rollout/staleness/max"] == 1 for line in ppo_lines(run)), "generation is ahead of the learner"
    )
    for count in (2, 1):
        answers[str(count)] = scale(count)
        command.wait_until(
            lambda wanted=count: ppo_lines(run)[-1]["rollout/generators"] == wanted, f"{count} generators make a batch"
        )
    answers["0"] = scale(0)
    end(command, signal.SIGTERM)
    return Ended(run, arguments, answers)


def test_the_steps_of_a_run_that_is_ahead(ended: Ended) -> None:
    lines = read_metrics(ended.run, "ppo")
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
    assert lines[0]["rollout/staleness/max"] == 0 and abs(lines[0]["ppo/kl"]) < 1e-3
    assert {line["rollout/staleness/max"] for line in lines} <= {0, 1}
    for line in lines:
        assert line["ppo/first_ratio_off_one"] < 1e-5
        assert 0.5 < line["ppo/importance_weight/mean"] < 1.5
        assert line["time/step"] == pytest.approx(line["time/sync"] + line["time/wait"] + line["time/learn"])
        assert {"idle/learner", "idle/scorer-0"} <= line.keys()


def test_a_run_is_scaled_up_and_down(ended: Ended) -> None:
    assert ended.scale["before"].code == 2 and "scale: nobody works on" in ended.scale["before"].err
    for count in ("2", "1"):
        assert ended.scale[count].code == 0, ended.scale[count].err
        assert f"wanted from now on: {count} generators, 1 scorers" in ended.scale[count].out
    assert ended.scale["0"].code == 2 and "at least one is needed" in ended.scale["0"].err
    lines = ppo_lines(ended.run)
    assert {line["rollout/generators"] for line in lines} == {1.0, 2.0}
    assert all(line["rollout/replacements"] == 0 for line in lines)


def test_an_interrupted_run_continues_from_its_checkpoint(ended: Ended, start: Any) -> None:
    run = ended.run
    assert not (run / "policy").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".policy")]
    before = ppo_lines(run)
    command = start("rayrlhf", *ended.arguments)
    command.wait_until(lambda: len(ppo_lines(run)) >= len(before) + 3, "three steps more")
    end(command, signal.SIGINT)
    lines = ppo_lines(run)
    assert lines[: len(before)] == before
    # SIGTERM asked for a checkpoint, which was written after the last line: no step is lost, none is done again.
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
    versions = [line["ppo/weight_version"] for line in lines]
    assert versions == sorted(set(versions)), versions
    # It learns with the weights that the steps before had ended with: the policy has moved away from the reference.
    assert lines[len(before)]["ppo/kl_k3"] > 10 * abs(lines[0]["ppo/kl_k3"])
    assert all(line["ppo/first_ratio_off_one"] < 1e-5 for line in lines[len(before) :])
    shown = [int(number) for number in re.findall(rf"^ppo +(\d+)/{STEPS} ", command.wait(1).out, re.MULTILINE)]
    assert shown[0] == len(before) + 1
