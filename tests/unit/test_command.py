"""The command answers at once: what it imports for help, for mistakes and for a look at a run; and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
import torch
import transformers
import typer

import rayrlhf
from jobs.cli import app
from rayrlhf.runs.stages import STAGES

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SLOW = (
    "torch", "transformers", "ray", "vllm", "matplotlib", "datasets", "pandas", "scipy", "pyarrow", "numpy",
    "tensorboard", "aiohttp",
)  # fmt: skip
"""Packages that take long to import: only the commands that need them may."""
STAGE_COMMANDS = ["run", *(stage.command for stage in STAGES.values())]
COMMANDS = [
    *STAGE_COMMANDS,
    "config",
    "init",
    "sweep",
    "submit",
    "compare",
    "agreement",
    "status",
    "scale",
    "doctor",
    "runs",
]

RUNNER = """
import contextlib, io, json, sys
from jobs.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["rayrlhf", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    slow = sorted(set(json.loads(sys.stdin.readline())) & sys.modules.keys())
    print(json.dumps([code, out.getvalue(), err.getvalue(), slow]))
"""


def run(calls: list[list[str]], directory: Path) -> list[list[Any]]:
    """Exit code, output, errors and slow modules after each call; all in one fresh interpreter, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(calls)], cwd=directory, input=(json.dumps(SLOW) + "\n") * len(calls),
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(calls: dict[tuple[str, ...], tuple[int, str]], directory: Path) -> None:
    """Each call ends with the code and says the words, in one line of errors where the code is 2; none imports much."""
    for (call, (code, words)), (got, out, err, slow) in zip(
        calls.items(), run([list(call) for call in calls], directory), strict=True
    ):
        assert not slow, (call, slow)
        assert got == code, (call, out, err)
        assert words in (err if code else out), (call, out, err)
        if code:
            assert out == "" and err.count("\n") == 1, (call, out, err)


def test_help_of_every_command(tmp_path: Path) -> None:
    group = typer.main.get_command(app)
    assert set(COMMANDS) <= set(group.commands)  # type: ignore[attr-defined]
    names = sorted(name for name, each in group.commands.items() if not each.hidden)  # type: ignore[attr-defined]
    check({("--help",): (0, "Usage: rayrlhf"), **{(n, "--help"): (0, f"Usage: rayrlhf {n}") for n in names}}, tmp_path)
    for _, out, err, slow in run([[]], tmp_path):
        assert all(name in out + err for name in names) and not slow


def test_versions_are_those_that_are_installed(tmp_path: Path) -> None:
    ((code, out, err, slow),) = run([["--version"]], tmp_path)
    assert code == 0 and not err and not slow
    printed = dict(line.split(" ") for line in out.splitlines())
    assert re.fullmatch(r"\d+\.\d+\S*", printed.pop("vllm"))  # which takes too long to import and ask
    assert printed == {each.__name__: each.__version__ for each in (rayrlhf, ray, torch, transformers)}


def test_the_document_has_every_command_and_option() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if command.hidden:
            continue
        assert f"`rayrlhf {name} " in text, name
        for option in command.params:
            if option.param_type_name == "option":
                assert f"`{option.opts[0]}" in text, (name, option.opts)


def test_a_mistake_in_the_config_is_one_line_of_every_stage(tmp_path: Path) -> None:
    calls: dict[tuple[str, ...], tuple[int, str]] = {}
    for file, override, words in (
        ("nowhere.yaml", "rl.steps=3", "nowhere.yaml: no such config file"),
        (QUICKSTART, "rl.stepz=3", "unknown key 'rl.stepz'; did you mean 'steps'?"),
        (QUICKSTART, "rl.steps=many", "key 'rl.steps': input should be a valid integer"),
        (QUICKSTART, "rl.steps", "write key.sub=value"),
    ):
        for command in [*STAGE_COMMANDS, "config"]:
            calls[command, file, override] = (2, words)
        calls["submit", "rl", file, override, "--working-dir", "/"] = (2, words)
    calls["ppo", QUICKSTART, "ppo.steps=3", "--local"] = (2, "the stage ppo is rl now")
    calls["sweep", "nowhere.yaml"] = (2, "nowhere.yaml: no such sweep file")
    calls["sweep", str(ROOT / "configs/sweeps/quickstart_ppo.yaml"), "rl.stepz=3"] = (2, "unknown key 'rl.stepz'")
    check(calls, tmp_path)


def test_a_starter_and_its_whole_config(tmp_path: Path) -> None:
    check(
        {
            ("init", "mine"): (0, "written: mine/config.yaml mine/README.md"),
            ("init", "."): (0, "written: config.yaml README.md"),
            ("config", "mine/config.yaml", "rl.steps=5"): (0, "  steps: 5  # command line\n"),
            ("init", "mine/"): (2, "mine/config.yaml: exists already"),
        },
        tmp_path,
    )


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    def completed(words: str) -> str:
        environment = {"_RAYRLHF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return subprocess.run(
            [sys.executable, "-c", "import sys; sys.argv[0] = 'rayrlhf'; from jobs.cli import main; main()"],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
        ).stdout  # fmt: skip

    assert completed("rayrlhf re").split() == ["reward-model", "report"]
    assert "--local" in completed("rayrlhf rl --")


def test_a_look_at_runs(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "one"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("name: one\n")
    lines = [{"stage": "rl", "step": step, "time": 1e9 + step, "rl/kl": 50.0 * step} for step in (1, 2)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check(
        {
            ("runs",): (0, "not running"),
            ("runs", "nowhere"): (2, "nowhere: no such directory"),
            ("status", "runs/one"): (0, "rl steps 1 to 2: the policy is 50.0 nats"),
            ("status", "runs/two"): (2, "two: no run folder"),
            ("doctor", "runs/one", "--output", "one.tar.gz"): (0, "most likely: the run ended in sft, "),
            ("doctor", "runs/two"): (2, "runs/two: no such folder"),
            ("scale", "runs/one"): (2, "say how many"),
            ("scale", "runs/one", "--generators", "2"): (2, "nobody works on runs/one"),
        },
        tmp_path,
    )
