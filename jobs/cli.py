"""The `rayrlhf` command: one sub-command a stage, `run` for all of them, and commands to look at and compare runs.

Help, completion and a mistake in a config have to answer at once. So this module imports only what is quick to import;
a command imports torch, Ray and the rest when it runs, after it has read its config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.guard import guarded
from rayrlhf.errors import UserError
from rayrlhf.runs.stages import STAGES
from rayrlhf.runs.versions import versions

if TYPE_CHECKING:
    from jobs.stage import Runner

app = typer.Typer(
    help="RLHF on Ray: supervised fine-tuning, a reward model from ranked answers, and reinforcement learning.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: to draw boxes round it took a third of its time
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file; examples are in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key.sub=value", help="Changes to the config, for example rl.steps=5."),
]
Local = Annotated[bool, typer.Option("--local", help="Run everything in this process, without Ray: for a debugger.")]
Folder = Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="runs/quickstart, or s3://bucket/runs/mine.")]
Address = Annotated[
    str | None,
    typer.Option(help="The run's cluster as host:port. Without it: RAY_ADDRESS, or where the run says it is."),
]


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    print(*(f"{name} {version}" for name, version in versions().items()), sep="\n")
    raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions, and exit."),
    ] = False,
) -> None:
    """What is common to all commands."""


def _exit(action: Callable[[], None]) -> None:
    """Run a command's action and end with its exit code."""
    raise typer.Exit(guarded(action))


def _add_stage(command: str, text: str, load: Callable[[], Runner]) -> None:
    """Add the sub-command that does with its config what the function does that `load` imports."""

    def run_command(config: ConfigFile, overrides: Overrides = None, local: Local = False) -> None:
        def action() -> None:
            from rayrlhf.config_file import load_config

            loaded = load_config(config, overrides)
            load()(loaded, local)

        _exit(action)

    app.command(command, help=text, short_help=text.split(". ")[0])(run_command)


@app.command("ppo", hidden=True, context_settings={"ignore_unknown_options": True})
def _old_name(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """The stage's name in earlier versions."""

    def action() -> None:
        raise UserError("the stage ppo is rl now: rayrlhf rl CONFIG, whose section rl has algorithm: ppo by default")

    _exit(action)


def _pipeline() -> Runner:
    from jobs.pipeline import run_all

    return run_all


def _stage(name: str) -> Runner:
    from jobs.pipeline import STAGE_FUNCTIONS
    from jobs.stage import run

    return lambda config, local: run(config, [STAGE_FUNCTIONS[name]], local)


_add_stage(
    "run", "Run all stages, one after the other. Finished stages are skipped; an interrupted run continues.", _pipeline
)
for each in STAGES.values():
    _add_stage(each.command, each.summary, lambda name=each.name: _stage(name))  # type: ignore[misc]


@app.command("config")
def config_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole config with its defaults, and behind each value where it comes from. The output is a config."""

    def action() -> None:
        from rayrlhf.config_origins import annotated

        print(annotated(config, overrides or []), end="")

    _exit(action)


@app.command("init")
def init_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or one without a config.yaml.")],
) -> None:
    """Write a commented config for a run on your own data, and a README with the next commands."""

    def action() -> None:
        from rayrlhf.starter import write_starter

        print("written:", *write_starter(directory))
        print(f"next: put your rows into {directory / 'demonstrations.jsonl'}, as {directory / 'README.md'} says")

    _exit(action)


@app.command("data")
def data_command(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG|FILE", help="A run's YAML file, or a file, directory or hub name of data.")
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Count tokens with this model's tokenizer. A file alone has the embedded one.")
    ] = None,
) -> None:
    """Show what a run would use of its data: records by use, lengths, what is dropped, cut or unused, an example."""

    def action() -> None:
        from jobs.console import console
        from jobs.data import show_data

        show_data(source, overrides or [], model, console)

    _exit(action)


@app.command("sweep")
def sweep_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The sweep's YAML file; an example is in configs/sweeps/.")
    ],
    overrides: Overrides = None,
) -> None:
    """Try hyper-parameters on Ray Tune and rank them. Finished trials are skipped; the same command continues."""

    def action() -> None:
        from rayrlhf.sweeps.plan import load_sweep

        plan = load_sweep(file, overrides or [])
        from jobs.sweep import sweep

        sweep(plan)

    _exit(action)


@app.command("submit")
def submit_command(
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE", help=f"One of run, {', '.join(stage.command for stage in STAGES.values())}, sweep."
        ),
    ],
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
    working_dir: Annotated[
        Path, typer.Option(help="The directory that is uploaded, without the files that its .rayignore names.")
    ] = Path("."),
    env: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the job and its actors; may be repeated.")
    ] = None,
    python: Annotated[
        str, typer.Option(help="How Python is called on the cluster; `uv run` takes the project's lock file.")
    ] = "python",
    follow: Annotated[bool, typer.Option(help="Print the job's log and exit as the job does.")] = True,
) -> None:
    """Run a stage, or all (`run`), as a job on a Ray cluster. The same command continues a job that was stopped."""

    def action() -> None:
        from jobs.job import describe

        job = describe(stage, config, overrides or [], working_dir, dict(_pair(each) for each in env or []), python)
        from jobs.submit import submit

        submit(job, address, follow)

    _exit(action)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"submit: --env {text!r} is not KEY=VALUE")
    return key, value


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_FOLDER...", help="Finished runs, paths or URIs, for example one for each seed."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for compare.md and curves.png.")] = None,
) -> None:
    """Print tables of one or more finished runs, with intervals; with --output also draw curves. Needs no Ray."""

    def action() -> None:
        from rayrlhf.reports import compare as comparison

        found = comparison.read_runs(runs)
        print(comparison.markdown(found))
        if output is not None:
            print("written:", *comparison.write(found, output))

    _exit(action)


@app.command("label")
def label_command(
    run_folder: Folder,
    host: Annotated[str, typer.Option(help="Where to listen; other machines need --public-url, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8100,
    public_url: Annotated[
        str | None, typer.Option(help="Where browsers find the page, for example behind a proxy.")
    ] = None,
    labellers: Annotated[str | None, typer.Option(help="Names, each with a link of its own: ann,bob.")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Labellers for each item. Without it: what collect asks for, or 1.")
    ] = None,
    mode: Annotated[str, typer.Option(help="rank: all answers at once; pairs: two at a time.")] = "rank",
    ratings: Annotated[bool, typer.Option("--ratings", help="Also ask for a rating of each answer, 1 to 7.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the order of answers and items; fixed at the first start. [default: 0]")
    ] = None,
    repeats: Annotated[float, typer.Option(help="Share of items that a labeller sees a second time.")] = 0.05,
    gold: Annotated[
        Path | None, typer.Option(help="JSONL of rankings that are known; everybody gets these items.")
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="Markdown for labellers. Without it: instructions.md of the run, or ours.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write rankings, pairs and judgements into this folder, and exit.")
    ] = None,
    imported: Annotated[
        Path | None, typer.Option("--import", help="Add the rankings of a JSONL file, and exit.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Delete all that this labeller said, and exit.")] = None,
) -> None:
    """Open a page on which people rank the run's answers. Needs no Ray; Ctrl-C ends it, judgements are kept."""

    def action() -> None:
        from jobs.label import Serving, label

        serving = Serving(host, port, public_url, labellers, overlap, mode, ratings, seed, repeats, gold, instructions)
        label(run_folder, serving, export, imported, forget)

    _exit(action)


@app.command("report")
def report_command(
    run_folder: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine and follow the run, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of --watch; 0 takes any that is free.")] = 8200,
) -> None:
    """Write a run's report.html anew, finished or not; with --watch, serve it live. Needs no Ray."""

    def action() -> None:
        from jobs import report

        if watch:
            report.watch(run_folder, port)
        else:
            report.write(run_folder)

    _exit(action)


@app.command("agreement")
def agreement_command(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_FOLDER...", help="Runs with the same answers, paths or URIs; often one alone."),
    ],
) -> None:
    """Print how far people, judge, reward model and gold measure agree on pairs of answers. Needs no Ray."""

    def action() -> None:
        from jobs.console import console
        from rayrlhf.reports.agreement import labellers_grid, raters_grid
        from rayrlhf.reports.raters import agreement_of, people_of
        from rayrlhf.runs.folder import run_at

        console.print(raters_grid(agreement_of(runs)).rich())
        for people in map(people_of, map(run_at, runs)):
            if people:
                console.print(labellers_grid(*people).rich())

    _exit(action)


@app.command()
def rounds(run_folder: Folder) -> None:
    """Show the rounds of a run side by side: gold, reward, KL, win rates, and accuracy of the reward models."""

    def action() -> None:
        from jobs.console import console
        from jobs.status import show_rounds

        show_rounds(run_folder, console)

    _exit(action)


@app.command()
def status(run_folder: Folder, address: Address = None) -> None:
    """Show a run, under way or not: its stage, step, time to go, actors and last warnings."""

    def action() -> None:
        from jobs.console import console
        from jobs.status import show_status

        show_status(run_folder, address, console)

    _exit(action)


@app.command()
def scale(
    run_folder: Folder,
    generators: Annotated[int | None, typer.Option(help="The number of generators wanted.")] = None,
    scorers: Annotated[int | None, typer.Option(help="The number of scorers wanted.")] = None,
    address: Address = None,
) -> None:
    """Grow or shrink the pools of a run while it trains. New actors join when they are ready; removed ones finish."""

    def action() -> None:
        from jobs.status import scale_run

        wanted = scale_run(run_folder, address, generators, scorers)
        print("wanted from now on: " + ", ".join(f"{count} {role}s" for role, count in wanted.items()))

    _exit(action)


@app.command()
def runs(
    directory: Annotated[
        str, typer.Argument(metavar="RUNS_DIR", help="Holds run folders: runs or s3://bucket/runs.")
    ] = "runs",
) -> None:
    """Print a table of the runs in a directory: how far each is, its last reward and KL, and whether it is running."""

    def action() -> None:
        from jobs.console import console
        from jobs.status import show_runs

        show_runs(directory, console)

    _exit(action)


def main() -> None:
    """Entry point of the `rayrlhf` command."""
    app()


if __name__ == "__main__":
    main()
