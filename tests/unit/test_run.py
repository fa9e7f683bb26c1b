"""The run folder: done means published, a changed config is refused where it matters, one writer at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayrlhf.config import Config, SFTConfig
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.config_rl import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.runs.addresses import runs_address
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.stages import STAGES


def config(**changes: object) -> Config:
    return parse_config({"name": "one", **changes}, "test")


def finish(run: RunFolder, *stages: str) -> None:
    for stage in stages:
        with run.writing(stage) as temporary:
            (temporary / "config.json" if temporary.is_dir() else temporary).write_text(stage)


def test_stage_is_done_exactly_when_published(tmp_path: Path) -> None:
    run = open_or_create(config(), tmp_path)
    for stage in STAGES:
        assert not run.done(stage)
        with run.writing(stage) as temporary:
            (temporary / "file" if temporary.is_dir() else temporary).write_text(stage)
            assert not run.done(stage)
            assert temporary.parent == run.path
        assert run.done(stage)
    assert (run.sft / "file").read_text() == "sft"
    assert (run.policy / "file").read_text() == "rl"
    assert run.comparisons.read_text() == "collect"
    assert sorted(p.name for p in run.path.iterdir()) == sorted(
        [".lock", "config.yaml", "outputs.json", *(STAGES[stage].output for stage in STAGES)]
    )


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_leaves_the_earlier_output_and_nothing_else(tmp_path: Path, stage: str) -> None:
    run = open_or_create(config(), tmp_path)
    finish(run, stage)

    def fail_half_way() -> None:
        with run.writing(stage) as temporary:
            (temporary / "config.json" if temporary.is_dir() else temporary).write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    output = run.output(stage)
    assert (output / "config.json" if output.is_dir() else output).read_text() == stage
    assert sorted(p.name for p in run.path.iterdir()) == sorted([".lock", "config.yaml", "outputs.json", output.name])


def test_publication_replaces_a_directory_as_a_whole(tmp_path: Path) -> None:
    run = open_or_create(config(), tmp_path)
    with run.writing("sft") as temporary:
        (temporary / "old").write_text("1")
    with run.writing("sft") as temporary:
        (temporary / "new").write_text("2")
    assert [p.name for p in run.sft.iterdir()] == ["new"]


def test_a_killed_writer_leaves_no_output_and_its_rest_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom rayrlhf.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).writing('sft') as t:\n"
        "    (t / 'model').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = open_or_create(config(), tmp_path)
    assert subprocess.run([sys.executable, "-c", code, str(run.path)], timeout=300).returncode == -signal.SIGKILL
    assert not run.done("sft")
    assert len(list(run.path.glob(".sft.tmp-*"))) == 1
    finish(run, "sft")
    assert list(run.path.glob(".sft.*")) == []


def test_config_of_record_round_trips(tmp_path: Path) -> None:
    first = config(seed=3, rl={"steps": 7, "optimizer": {"lr": 3e-6}})
    run = open_or_create(first, tmp_path)
    assert parse_config(yaml.safe_load(run.config.read_text()), "stored") == first
    assert run.path == tmp_path / "one"


@pytest.mark.parametrize(
    ("done", "change", "named"),
    [
        (["evaluate"], {"seed": 5}, "seed was 0 and is now 5"),
        (["sft"], {"model": {"path": "other"}}, "model.path was 'embedded:opt-tiny' and is now 'other'"),
        (["sft"], {"data": {"max_prompt_tokens": 99}}, "data.max_prompt_tokens was 160 and is now 99"),
        (["sft"], {"sft": {"optimizer": {"lr": 1.0}}}, "sft.optimizer.lr was 0.0001 and is now 1.0"),
        (["sft", "collect"], {"collect": {"prompts": 9}}, "collect.prompts was 256 and is now 9"),
        (["rl"], {"reward_model": {"epochs": 2}}, "reward_model.epochs was 1 and is now 2"),
        (["rl"], {"rl": {"kl": {"coefficient": 0.1}}}, "rl.kl.coefficient was 0.05 and is now 0.1"),
        (["sft", "rl"], {"rl": {"kl": {"coefficient": 0.1}}}, "rl.kl.coefficient was 0.05 and is now 0.1"),
        (["sft", "rl"], {"rl": {"from": "runs/a/policy"}}, "rl.from was None and is now 'runs/a/policy'"),
    ],
)
def test_changes_that_went_into_a_finished_stage_are_refused(
    tmp_path: Path, done: list[str], change: dict[str, object], named: str
) -> None:
    run = open_or_create(config(), tmp_path)
    finish(run, *done)
    before = run.config.read_text()
    with pytest.raises(UserError) as caught:
        open_or_create(config(**change), tmp_path)
    message = str(caught.value)
    assert named in message
    # Another run shares what stays as it is, if there is anything.
    shares = "sft" in done and "sft" not in change and not {"model", "data"} & {*change}
    assert message.endswith(
        f"that shares the rest: name=OTHER from={run.path}" if shares else "another run: name=OTHER"
    )
    assert f"delete {run.path}" in message
    assert "\n" not in message
    assert run.config.read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {"resources": {"generators": {"count": 3}}},
        {"runs_dir": "/elsewhere"},
        {"reward_model": {"epochs": 2}},
        {"rl": {"steps": 9}},
        {"evaluate": {"max_prompts": 5}},
    ],
)
def test_changes_of_what_is_not_done_are_stored(tmp_path: Path, change: dict[str, object]) -> None:
    run = open_or_create(config(), tmp_path)
    finish(run, "sft", "collect")
    open_or_create(config(**change), tmp_path)
    assert yaml.safe_load(run.config.read_text()) == dump_config(config(**change))


def test_a_stage_about_to_be_redone_does_not_bind(tmp_path: Path) -> None:
    run = open_or_create(config(), tmp_path)
    finish(run, *STAGES)
    other = config(evaluate={"prompts": "other.jsonl"})
    with pytest.raises(UserError, match=r"evaluate\.prompts"):
        open_or_create(other, tmp_path)
    open_or_create(other, tmp_path, redo=["evaluate"])
    with pytest.raises(UserError, match="stage 'collect' is already done"):
        open_or_create(config(evaluate={"prompts": "other.jsonl"}, sft={"epochs": 4}), tmp_path, redo=["sft"])


def test_many_changes_are_counted(tmp_path: Path) -> None:
    finish(open_or_create(config(), tmp_path), *STAGES)
    changed = config(seed=1).model_copy(update={"sft": SFTConfig(epochs=2, batch_size=7), "rl": PPOConfig(steps=5)})
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        open_or_create(changed, tmp_path)


@pytest.mark.parametrize("text", ["[1, 2", "- 1", "name: one\nno_such_key: 1"])
def test_an_unreadable_stored_config_is_named(tmp_path: Path, text: str) -> None:
    run = open_or_create(config(), tmp_path)
    run.config.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        open_or_create(config(), tmp_path)


def test_lock_keeps_other_processes_out_and_ends_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rayrlhf.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    run = RunFolder(tmp_path / "one")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on .*another name"), run.lock():
        raise AssertionError("two holders")
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate(timeout=300)
    with run.lock(), RunFolder(run.path).lock():
        assert (run.path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with run.lock():
        pass


def test_a_file_system_without_locks_is_named_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="its file system has no locks"), run.lock():
        raise AssertionError("held")
    assert run.holder() is None


def test_nested_lock_stays_held_until_the_outer_ends(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rayrlhf.runs.folder import RunFolder\nwith RunFolder(sys.argv[1]).lock(): print('took it')\n"
    )
    run = RunFolder(tmp_path / "one")
    with run.lock():
        with run.lock():
            pass
        other = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=300)
    assert other.returncode != 0
    assert f"process {os.getpid()}" in other.stderr
    other = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=300)
    assert other.stdout == "took it\n"


def test_runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_address("runs", inside_job=False) == f"{tmp_path}/runs"
    assert runs_address("../x", inside_job=False) == f"{tmp_path.parent}/x"
    assert runs_address("/abs/path", inside_job=True) == "/abs/path"
    assert runs_address("~/r", inside_job=True) == f"{Path.home()}/r"
    with pytest.raises(UserError, match="runs_dir=/abs/path"):
        runs_address("runs", inside_job=True)
    with pytest.raises(UserError, match="absolute"):
        RunFolder("runs/one")


def test_replacing_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with replacing(target) as temporary:
        temporary.write_text("1")
        assert not target.exists()

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("2")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert target.read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]
