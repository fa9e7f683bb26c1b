"""Writes docs/tour.ipynb: the cells below, executed on a finished run of the quick start.

    .venv/bin/python scripts/tour.py runs/quickstart

The site has it as a page (scripts/docs_site.py), and tests/e2e/test_tour.py executes it on another run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"

TOUR = """
%% text
# A tour of a finished run

`make quickstart` makes the run that is looked at here.
`scripts/tour.py` has written this page: it executes the cells on that run.
%% code
from rayrlhf import Run

run = Run("runs/quickstart")
list(run.models)
%% text
## How it was made

The config is an object; its keys are those of the YAML file.
%% code
rl = run.config.rl
rl.algorithm, rl.steps, rl.prompts_per_step * rl.samples_per_prompt, rl.temperature
%% text
## How good the models are

Means by source, and the policy's paired differences to SFT with 95 % intervals.
%% code
run.evaluation["mean"].unstack("source")[["sft", "policy", "reference"]].round(3)
%% code
run.differences.loc["policy_minus_sft", ["mean", "low", "high"]].round(3)
%% text
## What happened in training

A row for each step of each stage.
%% code
steps = run.metrics.query("stage == 'rl'").set_index("step")
steps[["rl/score/mean", "rl/kl", "rl/length/mean"]].tail(5).round(3)
%% text
## What the models write

The answers to which the reward model's score rose most.
%% code
samples = run.samples.assign(gain=lambda each: each.reward_policy - each.reward_sft)
samples.nlargest(3, "gain")[["reference", "sft", "policy", "gain"]].round(3)
%% text
## Ask them

What is typed is framed as the run's prompts were; here the first line is a title.
%% code
post = "Homework\\nMy dog ate my homework, and now I have to write it again."
run.generate(post, temperature=0.7, seed=1, score=True).T
%% text
## Take one away

A directory that transformers and vLLM load, with a card.
%% code
written = run.export("mine", license="apache-2.0")
print(*sorted(file.name for file in written.iterdir()), sep="\\n")
"""
CELLS = [(cell.partition("\n")[0], cell.partition("\n")[2].strip()) for cell in TOUR.strip().split("%% ")[1:]]
"""Kind and source of each cell."""


def notebook() -> nbformat.NotebookNode:
    """The notebook before it is executed."""
    made = nbformat.v4.new_notebook()
    for number, (kind, source) in enumerate(CELLS):
        cell = nbformat.v4.new_code_cell(source) if kind == "code" else nbformat.v4.new_markdown_cell(source)
        cell["id"] = f"cell-{number}"  # the same each time, so that only what has changed differs
        made.cells.append(cell)
    return made


def execute(run: Path) -> nbformat.NotebookNode:
    """The notebook, executed in a directory that has the run as runs/quickstart.

    Raises:
        CellExecutionError: a cell fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "runs").mkdir()
        (Path(directory) / "runs" / "quickstart").symlink_to(run.resolve())
        where = {"metadata": {"path": directory}}
        # Sockets in the file system, where nobody else reaches them. Their path has to be absolute: the kernel is in
        # another directory than this process.
        sockets = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(directory) / "kernel")}})
        done = NotebookClient(notebook(), timeout=600, resources=where, config=sockets).execute()
    for cell in done.cells:
        cell.get("metadata", {}).pop("execution", None)  # when it was
        if "outputs" in cell:  # warnings of libraries name paths of this machine; an error ends `execute`
            cell["outputs"] = [each for each in cell["outputs"] if each.get("name") != "stderr"]
    done.metadata.get("language_info", {}).pop("version", None)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run of the quick start")
    parser.add_argument("--output", type=Path, default=NOTEBOOK)
    arguments = parser.parse_args()
    nbformat.write(execute(arguments.run), arguments.output)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
