"""Ctrl-C and SIGTERM: a stage is asked once, and ended by a second one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.training.loop import LoopArguments
from jobs import stopping
from jobs.session import Session, opened
from jobs.stage import stage
from rayrlhf.config_file import parse_config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_of_one_moment_are_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    now, asked = [100.0], threading.Event()
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(KeyboardInterrupt), stopping.asking_first("sft", asked.set) as event:
        os.kill(os.getpid(), number)
        assert asked.wait(10) and event.is_set()
        now[0] += 0.5
        os.kill(os.getpid(), number)  # passed on by `uv run`, say
        now[0] += 10.0
        os.kill(os.getpid(), number)
        raise AssertionError("went on")
    again = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    said = f"stopping: sft writes a checkpoint when its step ends; {again} again ends it now\n"
    assert capsys.readouterr().out == said


def test_what_is_ignored_stays_ignored() -> None:
    """As a shell ignores SIGINT for `command &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.asking_first("sft", list) as event:
            os.kill(os.getpid(), signal.SIGINT)
        assert not event.is_set() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def until_asked(arguments: LoopArguments) -> None:
    """A loop whose driver gets Ctrl-C in the middle of a step."""
    os.kill(os.getpid(), signal.SIGINT)
    assert arguments.stop is not None
    while not arguments.stop.call("stop_requested", timeout_s=1):
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo", "rl"])
def test_ctrl_c_asks_the_loop_of_every_stage(tmp_path: Path, name: str) -> None:
    """Where it had not finished the command ends; where it was at its last step the next stage does not begin."""
    stages = ["sft", "collect", "dpo", "evaluate"] if name == "dpo" else None
    config = parse_config({"name": "run", "runs_dir": str(tmp_path), "stages": stages}, "test")
    with opened(config, local=True) as session:
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            session.train(name, until_asked, LoopArguments(**session.loop_arguments(name)))
        assert signal.getsignal(signal.SIGINT) is before

        def finishes(arguments: Any) -> None:
            until_asked(arguments)
            session.run.output(name).mkdir()

        session.train(name, finishes, LoopArguments(**session.loop_arguments(name)))

        @stage("evaluate")
        def next_stage(session: Session) -> None:
            raise AssertionError("it began")

        with pytest.raises(KeyboardInterrupt):
            next_stage(session)
