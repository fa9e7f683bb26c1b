"""What every stage has around it: skipping, refusing, exit codes, one line on standard error."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from actors.pools.remote import ActorDied, ActorFailure
from jobs.guard import guarded
from jobs.session import Session
from jobs.stage import run, stage
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.runs.error_log import entries
from rayrlhf.runs.metrics import MetricsWriter


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config({"name": "one", "runs_dir": str(tmp_path)}, "test")


def test_a_stage_that_the_run_does_without_is_refused(config: Config) -> None:
    @stage("dpo")
    def dpo(session: Session) -> None:
        raise AssertionError

    with pytest.raises(UserError, match="stage 'dpo' is no part of this run, whose stages are: sft, collect,"):
        run(config, [dpo], local=True)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("row 3 is bad; mend it"), 2, "error: row 3 is bad; mend it"),
        (ActorFailure("generator-0 is late"), 1, "failed: generator-0 is late"),
        (ActorDied("scorer-1 died"), 1, "failed: scorer-1 died"),
        (KeyboardInterrupt(), 130, "interrupted: finished stages and checkpoints are kept; the same command continues"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def fail() -> None:
        raise error

    assert guarded(fail) == code
    assert capsys.readouterr() == ("", f"{line}\n")


def test_the_operating_systems_and_rays_words_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")

    def task() -> None:
        wrapped = RayTaskError(
            "f()", "Traceback (most recent call last):\nValueError: bad\nmore", ValueError("bad\nmore")
        )
        raise wrapped.as_instanceof_cause()

    assert [guarded(disk), guarded(task)] == [1, 1]
    assert capsys.readouterr().err.splitlines() == [
        "failed: OSError: No space left on device: '/data/x'; free space on that disk",
        "failed: ValueError: bad more",
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("division by zero"), "sft: ZeroDivisionError: division by zero; the same command continues"),
        (FloatingPointError("the norm is nan"), "sft: the norm is nan"),
        (ActorDied("scorer-1 died"), "sft: scorer-1 died; the same command continues"),
    ],
)
def test_what_ends_a_run_is_one_line_that_names_a_log_with_the_whole_of_it(
    config: Config, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    folder = Path(config.runs_dir) / "one"

    @stage("sft")
    def fail(session: Session) -> None:
        with MetricsWriter(session.run.address) as metrics:
            for step in range(1, 6):
                metrics.write("sft", step, {"sft/loss": float(step)})
        raise type(error)(*error.args)

    assert guarded(lambda: run(config, [fail], local=True)) == 1
    log = folder / "errors.log"
    assert capsys.readouterr().err == f"failed: {told}; log: {log}\n"
    text = log.read_text()
    head, *rest = text.splitlines()
    assert head.startswith("==== ") and head.endswith(told.removesuffix("; the same command continues"))
    for part in ("versions: rayrlhf ", "Traceback (most recent call last):", "in fail\n    raise type(", "name: one\n"):
        assert part in text, part
    assert [json.loads(line)["step"] for line in rest if line.startswith("{")] == [3, 4, 5]
    guarded(lambda: run(config, [fail], local=True))
    said = [entry.splitlines()[0].split(" ", 2)[2] for entry in entries(log.read_text())]
    assert said == [told.removesuffix("; the same command continues")] * 2


def test_a_users_mistake_needs_no_log(config: Config) -> None:
    @stage("sft")
    def fail(session: Session) -> None:
        raise UserError("row 3 is bad")

    assert guarded(lambda: run(config, [fail], local=True)) == 2
    assert not (Path(config.runs_dir) / "one" / "errors.log").exists()


def test_success_is_0_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_errors_of_the_program_itself_keep_their_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(fail)


def test_a_stage_runs_once_and_says_where_its_output_is(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []

    @stage("sft")
    def train(session: Session) -> None:
        """Train."""
        ran.append(session.config.name)
        with session.run.writing("sft") as directory:
            (directory / "config.json").write_text("{}")

    assert train.__doc__ == "Train."
    run(config, [train, train], local=True)
    output = Path(config.runs_dir) / "one" / "sft"
    assert ran == ["one"] and output.is_dir()
    said = capsys.readouterr().out
    assert f"sft: already done, see {output}" in said and f"see {output}" in said.split("already")[0]
    run(config, [train], local=True)
    assert ran == ["one"]


def test_a_stage_may_run_again_for_something_else(config: Config) -> None:
    ran = []
    for earlier in ("sft", "reward_model", "policy"):
        Path(config.runs_dir, "one", earlier).mkdir(parents=True)

    @stage("evaluate", again=lambda session: session.config.evaluate.prompts is not None)
    def evaluate(session: Session) -> None:
        ran.append(session.config.evaluate.prompts)
        session.run.evaluation.write_text("{}")

    run(config, [evaluate, evaluate], local=True)
    file = Path(config.runs_dir, "other.jsonl")
    file.write_text('{"subreddit": "tea", "title": "Green", "post": "Or black?", "summary": "Which tea?"}\n')
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": str(file)})})
    run(other, [evaluate], local=True)
    run(config, [evaluate], local=True)
    assert ran == [None, str(file)]


def test_a_stage_waits_for_those_before_it(config: Config) -> None:
    @stage("rl")
    def rl(session: Session) -> None:
        pytest.fail("must not run")

    with pytest.raises(UserError, match=r"stage 'rl' needs .*/one/sft, which stage 'sft' writes; run that first"):
        run(config, [rl], local=True)
    (Path(config.runs_dir) / "one" / "sft").mkdir()
    with pytest.raises(UserError, match=r"needs .*/one/reward_model, which stage 'reward_model' writes"):
        run(config, [rl], local=True)


def test_what_may_be_given_instead_of_a_stage_is_named(config: Config) -> None:
    @stage("reward_model")
    def reward_model(session: Session) -> None:
        pytest.fail("must not run")

    (Path(config.runs_dir) / "one" / "sft").mkdir(parents=True)
    said = r"needs .*/comparisons.parquet, which stage 'collect' writes; run that first, or set data.comparisons"
    with pytest.raises(UserError, match=said):
        run(config, [reward_model], local=True)


def test_the_folder_is_free_again_after_a_failed_stage(config: Config) -> None:
    @stage("sft")
    def fail(session: Session) -> None:
        raise RuntimeError("boom")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            run(config, [fail], local=True)
