"""Sweeps: the file, the points, the trials' names and run folders, what is shared, the table."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.console import PlainConsole
from jobs.sweep import Board, _trainable, _with_lengths, draw
from rayrlhf.config import Config
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.reports.page import write_report
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.sharing import share
from rayrlhf.runs.stages import STAGES
from rayrlhf.runs.storage import Store
from rayrlhf.sweeps.plan import BASE, Space, Sweep, load_sweep, short_names, trial_name
from rayrlhf.sweeps.results import Result, ranked, read_result, results_table, write_results
from tests.s3 import KEYS, S3, serving

EXAMPLE = Path(__file__).parents[2] / "configs/sweeps/quickstart_ppo.yaml"
GRID = {"rl.optimizer.lr": {"grid": ["1e-4", 3e-4]}, "rl.kl.coefficient": {"grid": [0.05, 0.1]}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a config and a sweep of it; returns the sweep's path."""

    def make(search: Any = GRID, run: dict[str, Any] | None = None, **settings: Any) -> Path:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "run", "runs_dir": str(tmp_path), **(run or {})}))
        path = tmp_path / "sweep.yaml"
        tree = {"config": "run.yaml", "name": "search", "search": search, **settings}
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return make


def points(sweep: Sweep) -> list[dict[str, Any]]:
    return draw(sweep.search, sweep.settings.samples, sweep.base.seed)


# ---- the file


def test_the_example_is_a_sweep_of_ppo_on_dev() -> None:
    sweep = load_sweep(EXAMPLE)
    trials = sweep.trials(points(sweep), Path("/runs/x"))
    assert sweep.shared == ("sft", "collect", "reward_model")
    assert len(trials) == 4 and all(trial.config.evaluate.split == "dev" for trial in trials)
    plain = load_config(EXAMPLE.parent / "../quickstart.yaml")
    assert plain.evaluate.split == "test"
    assert sweep.base == plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"split": "dev"})})


def test_all_trials_have_the_lengths_that_the_data_has_chosen(write: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Who is number {i}?", "response": f"It is {i}."} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"demonstrations": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 70}
    plan = _with_lengths(load_sweep(write(run={"data": data})), str(tmp_path / "search"))
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    longest = max(len(tokenizer(" " + row["response"], add_special_tokens=False)["input_ids"]) for row in rows) + 1
    for config in (plan.base, *(trial.config for trial in plan.trials(points(plan), tmp_path / "search"))):
        assert config.data.to_choose == () and config.data.max_prompt_tokens == 70
        assert 0 < config.data.max_response_tokens <= longest
    assert "max_response_tokens" not in plan.command(plan.trials(points(plan), tmp_path)[0]), "it is chosen again"
    named = load_sweep(write(run={"data": {"max_prompt_tokens": 9, "max_response_tokens": 8}}))
    assert _with_lengths(named, str(tmp_path / "search")) is named


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"serach": 1}, "unknown key 'serach'; did you mean 'search'?"),
        ({"search": {}}, "key 'search'"),
        ({"search": {"rl.optimizer.lrr": {"grid": [1]}}}, "unknown key 'rl.optimizer.lrr'; did you mean 'lr'?"),
        ({"search": {"rl.steps": {"gird": [1]}}}, "search: rl.steps: unknown key 'gird'; did you mean 'grid'?"),
        ({"search": {"rl.steps": {"grid": [1], "choice": [2]}}}, "search: rl.steps: write one of"),
        ({"search": {"rl.steps": {"grid": []}}}, "search: rl.steps: key 'grid'"),
        ({"search": {"rl.steps": {"grid": [2.5]}}}, "key 'rl.steps': input should be a valid integer"),
        ({"search": {"rl.lam": {"uniform": [1, 0]}}}, "search: rl.lam: a range is [low, high]"),
        ({"search": {"rl.lam": {"loguniform": [0, 1]}}}, "low > 0 for loguniform"),
        ({"search": {"name": {"grid": ["a"]}}}, "'name' cannot be swept"),
        ({"fixed": {"rl.optimizer.lr": 1.0}}, "'rl.optimizer.lr' cannot be swept: it is fixed for all trials"),
        ({"fixed": {"rl.step": 1}}, "unknown key 'rl.step'; did you mean 'steps'?"),
        ({"fixed": {"evaluate.prompts": "a.jsonl"}}, "evaluate.prompts is set"),
        ({"metric": "policy.golf"}, "key 'metric': did you mean 'policy.gold'? (got 'policy.golf')"),
        ({"config": "none.yaml"}, "none.yaml: no such config file"),
        ({"run": {"environment": {"path": "a.py:Game"}}}, "metric 'policy.gold' is not measured in a run with an env"),
        ({"config": None}, "key 'config'"),
    ],
)
def test_mistakes_are_one_line(write: Any, settings: dict[str, Any], line: str) -> None:
    path = write(**settings)
    with pytest.raises(UserError) as caught:
        sweep = load_sweep(path)
        sweep.trials(points(sweep), path.parent)
    message = str(caught.value)
    assert line in message and "\n" not in message
    assert str(path.parent) in message


def test_overrides_change_the_sweep_or_its_config(write: Any) -> None:
    path = write(fixed={"rl.steps": 7, "rl.epochs": 3})
    sweep = load_sweep(path, ["samples=3", "name=other", "rl.steps=9", "evaluate.split=test"])
    assert (sweep.settings.samples, sweep.settings.name) == (3, "other")
    assert (sweep.base.rl.steps, sweep.base.rl.epochs, sweep.base.evaluate.split) == (9, 3, "test")
    with pytest.raises(UserError, match="cannot be swept"):
        load_sweep(path, ["rl.kl.coefficient=1"])


# ---- points and trials


def test_a_grid_is_every_combination_and_a_name_says_which(write: Any, tmp_path: Path) -> None:
    sweep = load_sweep(write())
    trials = sweep.trials(points(sweep), tmp_path / "search")
    names = [f"lr-{lr}_coefficient-{kl}" for lr in ("0.0001", "0.0003") for kl in ("0.05", "0.1")]
    assert sorted(trial.name for trial in trials) == names
    for trial in trials:
        config = trial.config
        assert trial.values == {
            "rl.optimizer.lr": config.rl.optimizer.lr,
            "rl.kl.coefficient": config.rl.kl.coefficient,
        }
        assert (config.name, config.runs_dir) == (trial.name, str(tmp_path / "search"))
        plain = {"name": "run", "runs_dir": str(tmp_path), "rl": sweep.base.rl}
        assert config.model_copy(update=plain) == sweep.base


def test_draws_repeat_and_more_samples_add_to_fewer() -> None:
    search = {
        "rl.optimizer.lr": Space(loguniform=(1e-5, 1e-2)),
        "rl.lam": Space(uniform=(0.9, 1.0)),
        "rl.epochs": Space(choice=[1, 2, 4]),
        "seed": Space(grid=[0, 1]),
    }
    found: list[dict[str, Any]] = draw(search, 50, seed=0)
    assert len(found) == 100
    assert draw(search, 10, seed=0) == found[:20] != draw(search, 10, seed=1)
    rates, lams = ([p[key] for p in found] for key in ("rl.optimizer.lr", "rl.lam"))
    assert all(1e-5 <= rate <= 1e-2 for rate in rates) and all(0.9 <= lam <= 1.0 for lam in lams)
    # Even over orders of magnitude: the mean of log10 of 100 draws from [-5, -2] is -3.5, give or take 0.09.
    assert sum(map(math.log10, rates)) / 100 == pytest.approx(-3.5, abs=0.35)
    assert all(float(f"{rate:.3g}") == rate for rate in rates)
    assert {p["rl.epochs"] for p in found} == {1, 2, 4}
    assert [p["seed"] for p in found] == [0, 1] * 50


def test_a_point_drawn_twice_is_one_trial(write: Any, tmp_path: Path) -> None:
    sweep = load_sweep(write({"rl.epochs": {"choice": [1, 2]}}, samples=20))
    assert len(points(sweep)) == 20
    assert sorted(t.name for t in sweep.trials(points(sweep), tmp_path)) == ["epochs-1", "epochs-2"]


def test_names_are_short_distinct_and_fit_for_a_folder(write: Any, tmp_path: Path) -> None:
    keys = ["rl.optimizer.lr", "sft.optimizer.lr", "seed", "rl.kl.coefficient"]
    assert list(short_names(keys).values()) == ["rl.optimizer.lr", "sft.optimizer.lr", "seed", "coefficient"]
    assert short_names(["a.epochs", "a.b.epochs"]) == {"a.epochs": "a.epochs", "a.b.epochs": "b.epochs"}
    assert trial_name({"rl.missing_eos_reward": -1.0, "rl.optimizer.betas": [0.9, 0.99]}) == (
        "missing_eos_reward--1.0_betas-0.9-0.99"
    )
    assert trial_name({"a.x": None, "a.y": True, "a.z": "some/path"}) == "x-null_y-true_z-some-path"
    sweep = load_sweep(write({"model.path": {"grid": ["a/b", "a_b"]}}))
    with pytest.raises(UserError, match="would both be named path-a-b"):
        sweep.trials(points(sweep), tmp_path)


# ---- sharing


@pytest.mark.parametrize(
    ("keys", "shared"),
    [
        (["rl.steps"], ("sft", "collect", "reward_model")),
        (["evaluate.temperature"], ("sft", "collect", "reward_model", "rl")),
        (["rl.steps", "collect.prompts"], ("sft",)),
        (["sft.epochs"], ()),
        (["rl.steps", "seed"], ()),
        (["data.max_prompt_tokens"], ()),
        (["resources.learner.threads"], ()),
    ],
)
def test_stages_before_the_first_swept_one_are_shared(write: Any, keys: list[str], shared: tuple[str, ...]) -> None:
    assert load_sweep(write({key: {"grid": [1, 2]} for key in keys})).shared == shared


def test_published_comparisons_need_no_collecting(write: Any) -> None:
    published = {"data": {"comparisons": {"format": "prompts", "path": "pairs.jsonl"}}}
    assert load_sweep(write(run=published)).shared == ("sft", "reward_model")


def finished(run: RunFolder, gold: float, reward: float, seconds: float) -> None:
    """What PPO and evaluation leave, with intervals of width 0.02."""

    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 50}

    with run.writing("rl") as directory:
        (directory / "config.json").write_text("policy")
    with MetricsWriter(run.address) as metrics:
        metrics.write("run", 3, {"time/rl": seconds - 10.0})
        metrics.write("run", 4, {"time/evaluate": 10.0})
    policy = {"gold": interval(gold), "reward": interval(reward), "kl": interval(2.5), "length": interval(21.0)}
    record = {
        "policy": policy,
        "sft": {"gold": interval(0.1)},
        "differences": {"policy_minus_sft": {"gold": interval(gold - 0.1)}},
        "metadata": {"data": "posts, dev split", "prompts": 50, "labeller": "reference"},
    }
    run.evaluation.write_text(json.dumps(record))


@pytest.fixture
def base(write: Any, tmp_path: Path) -> tuple[Sweep, RunFolder]:
    """A sweep of PPO whose base run is finished."""
    sweep, folder = load_sweep(write()), tmp_path / "search"
    run = open_or_create(sweep.base.model_copy(update={"name": BASE, "runs_dir": str(folder)}), folder)
    for stage in sweep.shared:
        with run.writing(stage) as output:
            if output.is_dir():
                (output / "deep").mkdir()
                (output / "deep" / "weights").write_text(stage)
            else:
                output.write_text(stage)
        with MetricsWriter(run.path) as metrics:
            if stage == "sft":
                metrics.write("sft", 1, {"sft/loss": 2.0})
            metrics.write("run", 0, {f"time/{stage}": 100.0})
    return sweep, run


def test_shared_stages_are_done_in_a_trial_without_taking_space(base: tuple[Sweep, RunFolder], tmp_path: Path) -> None:
    sweep, base_run = base
    first, second, *_ = sweep.trials(points(sweep), base_run.path.parent)
    runs = [open_or_create(trial.config, base_run.path.parent) for trial in (first, second)]
    for run in runs * 2:  # again does nothing
        share(base_run, run, sweep.shared)
    for run in runs:
        assert [stage for stage in sweep.shared if run.done(stage)] == list(sweep.shared)
        assert not run.done("rl")
        for file in ("sft/deep/weights", "reward_model/deep/weights", "comparisons.parquet"):
            assert (run.path / file).samefile(base_run.path / file)
        assert [line["stage"] for line in map(json.loads, run.metrics.open())] == ["sft", *["run"] * 3]
        write_report(run)
        assert "Supervised fine-tuning" in run.report.read_text()
    # A run's own outputs replace, they do not write into what is shared.
    with runs[0].writing("collect") as output:
        output.write_text("other")
    assert base_run.comparisons.read_text() == runs[1].comparisons.read_text() == "collect"
    # The trial is bound to what it started from, as any other run.
    with pytest.raises(UserError, match="stage 'sft' is already done"):
        open_or_create(first.config.model_copy(update={"seed": 5}), base_run.path.parent)


# ---- in a store


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A store, and its keys and the cache of a node in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "cache"))
    Store.open.cache_clear()
    with serving() as server:
        yield server


def test_a_sweep_in_a_store(s3: S3, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trials share, the log and the error of one that fails, and the table are in the store."""
    sweep, address = load_sweep(write()), s3.uri("runs/search")
    base = open_or_create(sweep.base.model_copy(update={"name": BASE, "runs_dir": address}), address)
    for stage in sweep.shared:
        with base.writing(stage) as output:
            (output / "weights" if output.is_dir() else output).write_text(stage)
    with MetricsWriter(base.address) as metrics:
        metrics.write("run", 0, {"time/sft": 100.0})
    trials = sweep.trials(points(sweep), address)[:2]
    runs = [open_or_create(trial.config, address) for trial in trials]
    for run in runs:
        share(base, run, sweep.shared)
        assert [stage for stage in STAGES if run.done(stage)] == list(sweep.shared)
        assert run.sft.joinpath("weights").samefile(base.sft / "weights")
    marks = {s3.objects(f"runs/search/{run.name}/sft/")[".done"] for run in (base, *runs)}
    assert len(marks) == 3  # each upload has its own

    def evaluate(config: Config, stages: object, local: bool) -> None:
        """The pipeline's place: it opens the run as `jobs.session.opened` does, and one of the two fails."""
        run = open_or_create(config, config.runs_dir)
        print("after the folder's files were downloaded")
        if run.name == runs[1].name:
            raise OSError("no space")
        finished(run, gold=0.12, reward=0.9, seconds=70.0)
        run.upload(run.evaluation)

    monkeypatch.setattr("jobs.sweep.run", evaluate)
    trial = _trainable({trial.name: trial.config for trial in trials}, os.getcwd())
    for _ in range(2):
        trial({"trial": runs[0].name})
        with pytest.raises(OSError, match="no space"):
            trial({"trial": runs[1].name})
    board = Board(sweep, trials, {run.name: run for run in runs}, RunFolder(address))
    assert write_results(board.folder, sweep, board.results())[0] == s3.uri("runs/search/sweep.md")

    objects = s3.objects("runs/search/")
    assert objects[f"{runs[0].name}/log.txt"].count(b"after") == 2 and f"{runs[0].name}/error.txt" not in objects
    assert objects[f"{runs[1].name}/log.txt"].count(b"OSError: no space") == 2
    assert objects[f"{runs[1].name}/error.txt"] == b"OSError: no space"
    assert (
        objects[f"{runs[0].name}/sft/weights"] == b"sft"
        and objects[f"{runs[0].name}/comparisons.parquet"] == b"collect"
    )
    assert b"time/sft" in objects[f"{runs[0].name}/metrics.jsonl"]
    record = json.loads(objects["sweep.json"])
    assert [(trial["state"], trial["seconds"]) for trial in record["trials"]] == [
        ("finished", 70.0),
        ("not finished", None),
    ]
    assert b"0.120 [0.110, 0.130]" in objects["sweep.md"]


# ---- the table


@pytest.fixture
def results(base: tuple[Sweep, RunFolder]) -> tuple[Sweep, Path, list[Result]]:
    """Two finished trials, one that failed, one that has not run."""
    sweep, base_run = base
    folder = base_run.path.parent
    trials = sorted(sweep.trials(points(sweep), folder), key=lambda trial: trial.name)
    runs = [open_or_create(trial.config, folder) for trial in trials]
    for run in runs:
        share(base_run, run, sweep.shared)
    finished(runs[0], gold=0.12, reward=0.9, seconds=70.0)
    finished(runs[2], gold=0.15, reward=0.4, seconds=200.0)
    errors = [None, "OutOfMemoryError: too | large [gpu]", None, None]
    return sweep, folder, [read_result(t, r, sweep.shared, e) for t, r, e in zip(trials, runs, errors, strict=True)]


def test_the_best_is_first_and_what_failed_is_last(results: tuple[Sweep, Path, list[Result]]) -> None:
    _, _, (low, failed, high, missing) = results
    assert ranked([low, failed, high, missing], "policy.gold", "max") == [high, low, failed, missing]
    assert ranked([low, failed, high, missing], "policy.gold", "min") == [low, high, failed, missing]
    assert ranked([high, low], "policy.reward", "max") == [low, high]
    assert ranked([low, high], "policy_minus_sft.gold", "max") == [high, low]
    assert [r.seconds for r in (low, high, failed)] == [70.0, 200.0, None]  # not those of the shared stages
    assert high.interval("policy_minus_sft.gold") == pytest.approx({"mean": 0.05, "low": 0.04, "high": 0.06, "n": 50})
    assert high.interval("policy.rouge1") is None


def test_the_table_in_markdown_json_and_terminal(results: tuple[Sweep, Path, list[Result]]) -> None:
    sweep, folder, found = results
    order = ranked(found, "policy.gold", "max")
    assert write_results(RunFolder(folder), sweep, order) == (f"{folder}/sweep.md", f"{folder}/sweep.json")
    page = (folder / "sweep.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page if line.startswith("|")]
    assert rows[0] == ["lr", "coefficient", "gold", "gold, policy − SFT", "reward", "kl", "length", "time"]
    assert rows[2][:5] == ["0.0003", "0.05", "0.150 [0.140, 0.160]", "0.050 [0.040, 0.060]", "0.400 [0.390, 0.410]"]
    assert rows[2][6:] == ["21.0 [21.0, 21.0]", "3 min 20 s"]
    assert rows[3][:3] == ["0.0001", "0.05", "0.120 [0.110, 0.130]"]
    assert rows[4] == ["0.0001", "0.1", "failed: OutOfMemoryError: too / large [gpu]", *["–"] * 5]
    assert rows[5] == ["0.0003", "0.1", "not finished", *["–"] * 5]
    assert "posts, dev split: 50 prompts" in page[2]
    command = "rayrlhf run {} name=search-best rl.optimizer.lr=0.0003 rl.kl.coefficient=0.05"
    assert command.format(sweep.config_file) in page

    record = json.loads((folder / "sweep.json").read_text())
    states = [trial["state"].partition(":")[0] for trial in record["trials"]]
    assert states == ["finished", "finished", "failed", "not finished"]
    gold = record["trials"][0]["measures"]["policy.gold"]
    assert gold == pytest.approx({"mean": 0.15, "low": 0.14, "high": 0.16, "n": 50})
    assert record["best"] == "lr-0.0003_coefficient-0.05" and record["split"] == "dev"
    assert record["shared_stages"] == ["sft", "collect", "reward_model"]

    console = PlainConsole(width=120, record=True, file=io.StringIO())  # as wide as a log
    console.print(results_table(sweep, order))
    shown = console.export_text()
    assert shown.index("[0.140, 0.160]") < shown.index("[0.110, 0.130]") < shown.index("failed:") < shown.index("[gpu]")
    uncut = {cell for row in rows[2:4] for whole in row[2:] for cell in whole.replace(" [", "\n[").splitlines()}
    assert all(cell in shown for cell in uncut)


def test_the_command_of_the_best_repeats_the_trial(write: Any, tmp_path: Path) -> None:
    """Its words, given to `rayrlhf run`, make the trial's config, with the test split for the dev split."""
    path = write(run={"rl": {"steps": 3}}, fixed={"rl.optimizer.betas": [0.5, 0.9], "evaluate.max_prompts": 9})
    sweep = load_sweep(path, ["model.path=some dir", "rl.missing_eos_reward=null"])
    trial = sweep.trials(points(sweep), tmp_path)[0]
    program, command, file, *overrides = shlex.split(sweep.command(trial))
    assert (program, command) == ("rayrlhf", "run")
    config = load_config(file, overrides)
    assert config.name == "search-best" and config.evaluate.split == "test"
    evaluate = config.evaluate.model_copy(update={"split": "dev"})
    same = {"name": trial.name, "runs_dir": trial.config.runs_dir, "evaluate": evaluate}
    assert config.model_copy(update=same) == trial.config
    assert config.rl.optimizer.lr == trial.values["rl.optimizer.lr"]
