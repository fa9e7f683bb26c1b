"""A sweep on Ray Tune: `rayrlhf sweep FILE`, or `... -- python -m jobs.sweep --config FILE` as a job.

Tune draws the points and runs the trials; a trial is the ordinary pipeline, in a run folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.variant_generator import generate_variants

from actors.pools.remote import ActorFailure
from jobs.choices import with_lengths, with_resources
from jobs.cluster import connected, inside_job, preflight
from jobs.console import console
from jobs.guard import guarded
from jobs.pipeline import STAGE_FUNCTIONS, pipeline
from jobs.stage import run
from rayrlhf.config import Config
from rayrlhf.errors import one_line
from rayrlhf.reports.measures import interval_text
from rayrlhf.reports.progress import duration
from rayrlhf.runs.addresses import join, runs_address
from rayrlhf.runs.contents import read_contents
from rayrlhf.runs.folder import RunFolder, open_or_create, stored_contents
from rayrlhf.runs.sharing import share
from rayrlhf.runs.starts import Starts, find_models
from rayrlhf.runs.storage import Mirror, local_copy
from rayrlhf.sweeps.plan import BASE, Space, Sweep, Trial, Value, load_sweep
from rayrlhf.sweeps.results import Result, ranked, read_result, results_table, write_results

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is a KeyboardInterrupt here as elsewhere
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's record is its run folder
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output is silent at verbose=0, the new one is not
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the config count from where the command was started
}
LOG = "log.txt"
"""The file in a trial's run folder that has what the trial prints."""
ERROR = "error.txt"
"""The file in a trial's run folder that has the error of a trial that failed, in one line."""


def sweep(plan: Sweep) -> None:
    """Run the stages that the trials share, then the trials that are not finished; rank them all.

    Raises:
        UserError: a value or a finished run that does not fit; more at a time than the cluster holds.
        ActorFailure: trials failed; the others are finished and in the table.
    """
    address = join(runs_address(plan.base.runs_dir, inside_job()), plan.settings.name)
    folder = RunFolder(address)
    with folder.lock():
        plan = _with_lengths(plan, address)
        base = plan.base.model_copy(update={"name": BASE, "runs_dir": address})
        trials = plan.trials(draw(plan.search, plan.settings.samples, base.seed), address)
        base_run = open_or_create(base, address) if plan.shared else None
        runs = {trial.name: open_or_create(trial.config, address) for trial in trials}
        left = [trial for trial in trials if not runs[trial.name].done("evaluate")]
        board = Board(plan, trials, runs, folder)
        if left:
            console.print(
                f"sweep {plan.settings.name!r}: {len(trials)} trials, {len(trials) - len(left)} finished; "
                f"shared: {', '.join(plan.shared) or 'nothing'}; results in {address}"
            )
            if base_run is not None:
                run(base, [STAGE_FUNCTIONS[stage] for stage in plan.shared], local=False)
                for trial in left:
                    share(base_run, runs[trial.name], plan.shared)
            with connected(base):
                shared, _ = with_resources(base, local_copy(_start_of(base)))
                preflight(shared, min(plan.settings.concurrent, len(left)))
                run_trials(left, plan.settings.concurrent, board)
        results = board.results()
        written = write_results(folder, plan, results)
        console.print(results_table(plan, results))
        if not left:
            console.print(f"sweep {plan.settings.name!r} is finished: all {len(trials)} trials were done before")
        if results[0].interval(plan.settings.metric):
            console.print(f"the best one, on the test split: {plan.command(results[0].trial)}", soft_wrap=True)
        console.print(", ".join(written), soft_wrap=True)
        failed = [result for result in results if result.error]
        if failed:
            raise ActorFailure(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again")


def _with_lengths(plan: Sweep, address: str) -> Sweep:
    """The plan with the lengths that its config leaves open, which all trials have; a line says what they are."""
    base = plan.base.model_copy(update={"name": BASE, "runs_dir": address})
    if not base.data.to_choose:
        return plan
    run = RunFolder(join(address, BASE))
    contents = read_contents(base, find_models(base), stored_contents(run))
    chosen, line = with_lengths(base, run, local_copy(_start_of(base)), contents)
    if line:
        console.print(line, soft_wrap=True)
    return plan.with_lengths(chosen)


def _start_of(base: Config) -> str:
    """The model with which the trials begin."""
    return Starts(base, RunFolder(join(base.runs_dir, base.name)), find_models(base)).base


def draw(search: Mapping[str, Space], samples: int, seed: int) -> list[dict[str, Value]]:
    """The points of a search, each a dotted key to its value.

    Draws repeat with the seed, and more samples add points to those of fewer: a longer sweep keeps its trials.
    """
    spec = {key: _tune_space(space) for key, space in search.items()}
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(samples):
        for _, point in generate_variants({"point": spec}, random_state=rng):
            points.append({key: _rounded(value, search[key]) for key, value in point["point"].items()})
    return points


def _tune_space(space: Space) -> Any:
    if space.grid is not None:
        return tune.grid_search(space.grid)
    if space.choice is not None:
        return tune.choice(space.choice)
    return tune.uniform(*space.uniform) if space.uniform is not None else tune.loguniform(*space.loguniform or ())


def _rounded(value: Any, space: Space) -> Value:
    """A number drawn from a range, rounded to three digits, so that the run folder's name has it exactly."""
    return value if space.uniform is None and space.loguniform is None else float(f"{value:.3g}")


def run_trials(trials: Sequence[Trial], concurrent: int, board: Board) -> None:
    """Run the pipeline of each trial under Ray Tune, which tells `board` what becomes of each."""
    os.environ.update(TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's traceback is in its log
    configs = {trial.name: trial.config for trial in trials}
    # The trial itself only drives its roles: no CPU of its own, but the machine where this command runs.
    here = {"CPU": 0, f"node:{ray.util.get_node_ip_address()}": 0.001}
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            tune.with_resources(_trainable(configs, os.getcwd()), here),
            param_space={"trial": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(search_alg=BasicVariantGenerator(max_concurrent=concurrent)),
            run_config=tune.RunConfig(name="sweep", storage_path=scratch, verbose=0, callbacks=[board]),
        ).fit()


def _trainable(configs: Mapping[str, Config], directory: str) -> Callable[[dict[str, Any]], None]:
    def run_trial(point: dict[str, Any]) -> None:
        config = configs[point["trial"]]
        os.chdir(directory)
        folder = RunFolder(join(config.runs_dir, config.name))
        error_file = folder.path / ERROR
        error_file.unlink(missing_ok=True)
        folder.upload(error_file)
        with (
            contextlib.closing(Mirror(folder.address, [LOG])),  # closed last: the log is whole by then
            (folder.path / LOG).open("a", buffering=1, encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                run(config, [pipeline], local=False)
            except Exception as error:
                traceback.print_exc()
                # In a file of our own: Tune's is not always there yet when it tells of the failure.
                error_file.write_text(f"{type(error).__name__}: {one_line(error)[:300]}", encoding="utf-8")
                folder.upload(error_file)
                raise

    return run_trial


class Board(TrialProgressCallback):
    """Prints a line when a trial starts and when it ends, and keeps the results up to date.

    Tune calls its `on_...` methods. It takes the place of Tune's own reporter, which Tune adds where it finds none.
    """

    def __init__(self, plan: Sweep, trials: Sequence[Trial], runs: Mapping[str, RunFolder], folder: RunFolder) -> None:
        super().__init__()
        self.plan, self.folder = plan, folder
        self.trials = {trial.name: trial for trial in trials}
        self.runs = runs
        self.errors: dict[str, str] = {}
        self.took: list[float] = []
        self.started: dict[str, float] = {}

    def results(self) -> list[Result]:
        """All trials, best first."""
        found = [
            read_result(trial, self.runs[name], self.plan.shared, self.errors.get(name))
            for name, trial in self.trials.items()
        ]
        return ranked(found, self.plan.settings.metric, self.plan.settings.mode)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """Nothing to say: a trial's steps are in its log."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self.started[name] = time.monotonic()
        run = self.runs[name]
        self._say(name, f"started, see {run.address_of(run.path / LOG)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name, metric = trial.config["trial"], self.plan.settings.metric
        result = read_result(self.trials[name], self.runs[name], self.plan.shared)
        self._end(name, f"{metric} {interval_text(result.interval(metric))}", trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        said = self.runs[name].path / ERROR
        self.errors[name] = said.read_text(encoding="utf-8") if said.exists() else "its process died, see its log"
        self._end(name, f"failed: {self.errors[name]}", trials)

    def _end(self, name: str, what: str, trials: Iterable[Any]) -> None:
        seconds = time.monotonic() - self.started.get(name, time.monotonic())  # it may fail before it starts
        self.took.append(seconds)
        left = sum(name not in self.errors and not run.done("evaluate") for name, run in self.runs.items())
        rounds = math.ceil(left / self.plan.settings.concurrent)
        eta = duration(rounds * sum(self.took) / len(self.took))
        self._say(name, f"{what}, took {duration(seconds)}, ETA {eta}")
        write_results(self.folder, self.plan, self.results())

    def _say(self, name: str, what: str) -> None:
        number = list(self.trials).index(name) + 1
        console.print(f"trial {number}/{len(self.trials)} {name}: {what}", soft_wrap=True)


def main() -> None:
    """The command line of `python -m jobs.sweep`."""
    parser = argparse.ArgumentParser(description=sweep.__doc__)
    parser.add_argument("--config", required=True, help="the sweep's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the sweep or its config")
    arguments = parser.parse_args()
    code = guarded(lambda: sweep(load_sweep(arguments.config, arguments.overrides)))
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
