"""`rayrlhf compare`: numbers in its tables against hand computation, lines in its figure, the command."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.axes import Axes
from typer.testing import CliRunner

from jobs.cli import app
from rayrlhf.errors import UserError
from rayrlhf.reports.compare import markdown, mean_over_runs, pooled_difference, read_runs, write
from rayrlhf.reports.curves import CURVES, compare_figure, curve, moving_average, path_over_kl
from rayrlhf.reports.intervals import length_controlled_difference
from rayrlhf.reports.page.comparison import compared_charts, compared_page

ROOT = Path(__file__).resolve().parents[2]
N = 12
T_2 = 4.302653  # 97.5 % quantiles of Student's t with 2 degrees of freedom and of the normal, from a table
Z = 1.959964


def step_line(step: int, seed: int) -> dict[str, Any]:
    """Proxy and KL rise by steps of fixed size, gold rises and falls; seeds are shifted against each other."""
    return {
        "stage": "rl",
        "step": step,
        "time": 1e9 + step,
        "rl/score/mean": 0.1 * step + seed,
        "rl/score/std": 2.0,
        "rl/gold/mean": 0.2 + 0.01 * step * (8 - step),
        "rl/gold/std": 0.5,
        "rl/kl": 0.25 * step**2,
        "rl/kl_std": 1.0,
        "rl/length/mean": 20.0 + seed,
        "rl/length/std": 4.0,
        "rl/eos_rate": 0.9,
        "rl/entropy": 3.0 - 0.1 * step,
        "rl/responses": 64,
        "time/generate": 1.0 + seed,
        "time/score": 0.5,
        "time/learn": 2.0,
        "time/sync": 0.25,
        "time/step": 4.0 + seed,
        "throughput/tokens_per_s": 1000.0 * (1 + seed),
    }


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02, "n": N}


def make_run(folder: Path, seed: int, steps: int = 9, **config: Any) -> Path:
    """A finished run as the pipeline leaves it, as far as `compare` reads it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": folder.name, "seed": seed, "rl": config}))
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {"id": [f"p{i}" for i in range(N)]}
    for measure, scale in (("reward", 1.0), ("gold", 0.1), ("length", 5.0)):
        columns[f"{measure}_sft"] = rng.normal(scale, scale, N)
        columns[f"{measure}_policy"] = columns[f"{measure}_sft"] + rng.normal(scale / 2, scale, N)
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    change = {**interval(0.5 + 0.1 * seed), "p": 0.25 if seed else 0.0002}
    evaluation = {
        "sft": {"reward": interval(0.25), "gold": None, "length": interval(20.0), "rouge1": interval(0.1)},
        "policy": {"reward": interval(0.75 + 0.1 * seed), "gold": interval(0.5), "rouge1": interval(0.1 + 0.01 * seed)},
        "title": {"reward": interval(-0.2), "rouge1": interval(0.3)},
        "differences": {"policy_minus_sft": {"reward": change, "gold": None}},
        "metadata": {"prompts": N, "data": "planted"},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    lines: list[dict[str, Any]] = [step_line(step, seed) for step in range(steps)]
    lines.append({"stage": "run", "step": 3, "time": 2e9, "time/rl": 30.0 + 10 * seed})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / f"seed{seed}", seed) for seed in range(3)]


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Cells by first cell, of the first table after `title`."""
    lines = text[text.index(title) :].splitlines()
    found = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    table = itertools.takewhile(lambda line: line.startswith("|"), found)
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}


def test_means_are_over_runs_with_t_intervals(folders: list[Path]) -> None:
    runs = read_runs(folders)
    reward = mean_over_runs(runs, "policy", "reward")
    half = T_2 * 0.1 / np.sqrt(3)
    assert reward is not None
    assert [reward.mean, reward.low, reward.high] == pytest.approx([0.85, 0.85 - half, 0.85 + half])
    table = rows(markdown(runs), "## Evaluation")
    assert table["measure"] == ["title", "SFT", "policy"]
    # Titles and SFT answers are the same in all runs, so that only prompts tell.
    assert table["reward"][:2] == ["-0.200 [-0.210, -0.180]", "0.250 [0.240, 0.270]"]
    assert table["reward"][2] == f"0.850 [{0.85 - half:.3f}, {0.85 + half:.3f}]"
    assert table["length"] == ["–", "20.0 [20.0, 20.0]", "–"]
    assert "kl" not in table
    each = rows(markdown(runs), "policy, each run")
    assert each["reward"] == ["0.750 [0.740, 0.770]", "0.850 [0.840, 0.870]", "0.950 [0.940, 0.970]"]


def test_differences_of_each_run_and_pooled(folders: list[Path]) -> None:
    runs = read_runs(folders)
    samples = [pq.read_table(folder / "samples.parquet") for folder in folders]
    grid = {
        m: np.array([s[f"{m}_policy"].to_numpy() - s[f"{m}_sft"].to_numpy() for s in samples])
        for m in ("reward", "gold", "length")
    }
    for measure in ("reward", "gold"):
        plain = pooled_difference(runs, measure)
        assert plain is not None and plain.mean == pytest.approx(grid[measure].mean()) and plain.n == N
        controlled = pooled_difference(runs, measure, at_equal_length=True)
        intercept = np.polyfit(grid["length"].ravel(), grid[measure].ravel(), 1)[1]
        assert controlled is not None and controlled.mean == pytest.approx(intercept)
    table = rows(markdown(runs), "## Policy minus SFT")
    assert table["measure"] == ["seed0", "seed1", "seed2", "pooled"]
    assert table["reward"][:2] == ["0.500 [0.490, 0.520], p < 0.001", "0.600 [0.590, 0.620], p = 0.250"]
    assert table["reward"][3].startswith(f"{grid['reward'].mean():.3f} [")
    assert table["gold"][:3] == ["–", "–", "–"]
    assert "rouge2" not in table
    one = pooled_difference(runs[:1], "reward", at_equal_length=True)
    by_prompts = length_controlled_difference(
        *(samples[0][f"{m}_{s}"].to_numpy() for m in ("reward", "length") for s in ("policy", "sft"))
    )
    assert one is not None and by_prompts is not None
    assert one.mean == pytest.approx(by_prompts.mean)
    assert one.high - one.low == pytest.approx(by_prompts.high - by_prompts.low, rel=0.15)


def test_shares_over_runs_are_shares(folders: list[Path]) -> None:
    """Of win rates 0.6, 1 and 1, Student's t interval reaches 1.44."""
    for folder, rate in zip(folders, (0.6, 1.0, 1.0), strict=True):
        evaluation = json.loads((folder / "evaluation.json").read_text())
        for name in ("win_rate_vs_sft", "eos_rate"):
            evaluation["policy"][name] = {"mean": rate, "low": rate - 0.1, "high": min(1.0, rate + 0.1), "n": N}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    runs = read_runs(folders)
    mean, half = 2.6 / 3, T_2 * np.std([0.6, 1, 1], ddof=1) / np.sqrt(3)
    odds = mean / (1 - mean) * np.exp([sign * half / (mean * (1 - mean)) for sign in (-1, 1)])
    for name in ("win_rate_vs_sft", "eos_rate"):
        found = mean_over_runs(runs, "policy", name)
        assert found is not None and found.mean == pytest.approx(mean)
        assert [found.low, found.high] == pytest.approx(odds / (1 + odds))
        assert rows(markdown(runs), "## Evaluation")[name][2] == f"0.867 [{found.low:.3f}, {found.high:.3f}]"


def test_time_tables(folders: list[Path]) -> None:
    text = markdown(read_runs(folders))
    stages = rows(text, "## Time")
    assert stages["rl"] == ["40 (30 to 50)", "2,000 (1,000 to 3,000)"]
    assert stages["sft"] == ["–", "–"]
    phases = rows(text, "| phase of a RL step")
    assert phases["generate"] == ["2.00 (1.00 to 3.00)"]
    assert phases["learn"] == ["2.00 (2.00 to 2.00)"]
    assert rows(markdown(read_runs(folders[:1])), "| phase of a RL step")["step"] == ["4.00"]


def test_one_run_has_its_intervals_over_prompts(folders: list[Path]) -> None:
    text = markdown(read_runs(folders[:1]))
    assert rows(text, "## Evaluation")["reward"][2] == "0.750 [0.740, 0.770]"
    assert rows(text, "## Policy minus SFT")["measure"] == ["seed0"]
    assert "each run" not in text and "pooled" not in text.lower()


def test_configs_that_differ_are_named(folders: list[Path], tmp_path: Path) -> None:
    assert "Not only the seed differs" not in markdown(read_runs(folders))
    other = make_run(tmp_path / "other", 5, steps=4, kl={"coefficient": 0.1}, lr=1)
    text = markdown(read_runs([folders[0], other]))
    assert "**Not only the seed differs**: rl.kl.coefficient (not set, 0.1), rl.lr (not set, 1)." in text


def test_warnings_of_each_run_are_listed_with_their_limits(folders: list[Path]) -> None:
    """KL is a quarter of the step's square: 12.25 in step 7 and 16 in step 8."""
    assert "## Warnings\n\nnone" in markdown(read_runs(folders))
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    (folders[1] / "config.yaml").write_text(yaml.safe_dump({**config, "alarms": {"max_kl": 12.0}}))
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "run", "step": 2, "time": 2e9, "warnings": ["no better than length"]}) + "\n")
    section = markdown(read_runs(folders)).split("## Warnings\n\n")[1]
    labels = [run.label for run in read_runs(folders)]
    assert f"| {labels[0]} | reward_model | no better than length | – | – | – |" in section
    assert f"| {labels[1]} | rl steps 7 to 8 | the policy is 12.2 nats" in section
    assert "| max_kl 12 | 12.2 | 16 |" in section


def test_runs_of_before_lengths_and_p_values(folders: list[Path]) -> None:
    for folder in folders:
        table = pq.read_table(folder / "samples.parquet")
        pq.write_table(table.drop_columns(["length_sft", "length_policy", "gold_sft"]), folder / "samples.parquet")
        evaluation = json.loads((folder / "evaluation.json").read_text())
        del evaluation["differences"]["policy_minus_sft"]["reward"]["p"]
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    table = rows(markdown(read_runs(folders)), "## Policy minus SFT")
    assert set(table) == {"measure", "---", "reward"}
    assert table["reward"][0] == "0.500 [0.490, 0.520]"


def panel(figure: Any, title: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def band(axes: Axes, index: int = 0) -> tuple[float, float]:
    """Lowest and highest point of an interval band."""
    heights = np.asarray(axes.collections[index].get_paths()[0].vertices)[:, 1]
    return float(heights.min()), float(heights.max())


def test_moving_average() -> None:
    ramp = np.arange(40.0)
    assert moving_average(40) @ ramp == pytest.approx(ramp)  # a trend is not bent, at the ends neither
    spike = moving_average(40) @ (ramp == 20)
    assert spike[17:24] == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0])
    assert moving_average(20)[10][8:13] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    assert np.array_equal(moving_average(9), np.eye(9))


def test_band_of_one_run_is_over_responses(folders: list[Path]) -> None:
    lines = [step_line(step, 0) for step in range(40)]
    smooth = curve(lines, CURVES[0])
    assert smooth is not None
    assert smooth.half[[0, 1, 20]] == pytest.approx(Z * 2 / 8 / np.sqrt([1, 3, 5]))  # that many steps are averaged
    figure = compare_figure([lines[:9]], {})
    axes = panel(figure, "Response length")
    (mean,) = axes.get_lines()
    assert np.asarray(mean.get_xydata()).tolist() == [[step, 20.0] for step in range(9)]
    assert band(axes) == pytest.approx((20 - Z * 0.5, 20 + Z * 0.5))
    ends = panel(figure, "Responses that end by themselves")
    # On the scale of log-odds, which are log 9, with a standard error of 1 / sqrt(64 * 0.09).
    odds = 9 * np.exp([-Z / np.sqrt(64 * 0.09), Z / np.sqrt(64 * 0.09)])
    assert band(ends) == pytest.approx(odds / (1 + odds))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["mean of a step", "95 % interval over responses"]


def test_band_of_three_runs_is_over_runs() -> None:
    runs = [[step_line(step, seed) for step in range(9 + seed)] for seed in range(3)]
    figure = compare_figure(runs, {})
    axes = panel(figure, "Response length")
    *thin, thick = axes.get_lines()
    assert [np.asarray(line.get_xydata()).shape for line in thin] == [(9, 2), (10, 2), (11, 2)]
    assert [np.unique(line.get_ydata()).tolist() for line in thin] == [[20.0], [21.0], [22.0]]
    assert np.asarray(thick.get_xydata()).tolist() == [[step, 21.0] for step in range(9)]  # steps that all have
    assert thick.get_linewidth() > 2 * thin[0].get_linewidth()
    assert band(axes) == pytest.approx((21 - T_2 / np.sqrt(3), 21 + T_2 / np.sqrt(3)))
    assert not panel(compare_figure(runs[:2], {}), "Response length").collections


def test_proxy_and_gold_part_over_kl() -> None:
    lines = [step_line(step, 0) for step in range(9)]
    axes = panel(compare_figure([lines], {}), "Proxy and gold against KL")
    proxy, gold, _ = axes.get_lines()
    x, y = np.asarray(proxy.get_xydata()).T
    assert (x[0], x[-1]) == (0.0, pytest.approx(4.0))  # the root of KL, which rises by 0.5 a step
    assert y == pytest.approx(x / 0.5 * 0.1 / 2.0)  # in standard deviations of the first step's scores
    x, y = np.asarray(gold.get_xydata()).T
    at_steps = np.interp(0.5 * np.arange(9), x, y)
    assert at_steps == pytest.approx([0.01 * s * (8 - s) / 0.5 for s in range(9)], abs=0.005)
    assert {text.get_text() for text in axes.texts} == {"Proxy", "Gold"}
    assert "KL" in axes.get_xlabel()


def test_what_older_runs_lack_is_left_out() -> None:
    new = ("rl/gold/mean", "rl/gold/std", "rl/kl_std", "rl/length/std", "rl/responses")
    lines = [{k: v for k, v in step_line(step, 0).items() if k not in new} for step in range(9)]
    figure = compare_figure([lines], {})
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    assert not titles & {"Gold: labeller's own measure", "Proxy and gold against KL"}
    assert len(titles) == 6
    bands = [axes.collections[0].get_paths() for axes in figure.axes if axes.collections]
    assert len(bands) == 5 and not any(np.size(path.vertices) for paths in bands for path in paths)
    assert path_over_kl(lines) is None
    assert path_over_kl([]) is None


def test_charts_of_several_runs_have_each_run_and_the_mean() -> None:
    """Of two runs whose steps overlap in part, with markup in a name."""
    lines = {"<a>": [step_line(step, 0) for step in (1, 2, 3)], "b": [step_line(step, 1) for step in (2, 3, 4)]}
    kl, over = (compared_charts(lines)[place] for place in (2, -1))
    assert kl.title == "KL to the reference policy" and kl.x == [1, 2, 3, 4]
    first, second, mean = kl.series
    assert (first.words, second.words, mean.words) == ("<a>", "b", "mean of 2 runs")
    assert first.values[3] is None and second.values[0] is None and mean.values[0] is None and mean.values[3] is None
    ours, theirs = (np.array(each.values[1:3], np.float64) for each in (first, second))
    assert mean.values[1:3] == pytest.approx((ours + theirs) / 2)
    assert over.title == "Proxy and gold against KL" and len(over.series) == 4
    assert sum(value is not None for value in over.series[0].values) == 3
    html = compared_page("# <a>\n", lines)
    assert "<h1>&lt;a&gt;</h1>" in html and "<a>" not in html
    (alone,) = compared_charts({"b": lines["b"]})[2].series
    assert alone.words == "b"


def test_files(folders: list[Path], tmp_path: Path) -> None:
    text, image, page = write(read_runs(folders), tmp_path / "out" / "deep")
    assert text.read_text().endswith("\n![curves](curves.png)\n")
    pixels = matplotlib.image.imread(image)
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
    assert sorted(path.name for path in text.parent.iterdir()) == ["compare.html", "compare.md", "curves.png"]
    html = page.read_text()
    assert "<h2>Policy minus SFT</h2>" in html and "Content-Security-Policy" in html


def broken(folder: Path, kind: str) -> None:
    match kind:
        case "gone":
            shutil.rmtree(folder)
        case "unfinished":
            (folder / "evaluation.json").unlink()
        case "torn":
            (folder / "evaluation.json").write_text('{"policy": ')
        case "foreign":
            (folder / "evaluation.json").write_text("[]")
        case "no samples":
            (folder / "samples.parquet").write_bytes(b"PAR1")
        case "no steps":
            (folder / "metrics.jsonl").write_text("")
        case "other prompts":
            table = pq.read_table(folder / "samples.parquet")
            pq.write_table(table.slice(0, 7), folder / "samples.parquet")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gone", "seed1 is no run folder: it has no config.yaml"),
        ("unfinished", "seed1 is unfinished: it has no evaluation.json"),
        ("torn", "seed1/evaluation.json: is damaged .*; delete evaluation.json"),
        ("foreign", "seed1/evaluation.json: is damaged .*; delete evaluation.json"),
        ("no samples", "seed1/samples.parquet: is damaged .*; delete evaluation.json"),
        ("no steps", "seed1 has no steps of dpo or rl in metrics.jsonl"),
        ("other prompts", "seed1 was evaluated on other prompts than .*seed0 .7 and 12, 7 of them the same"),
    ],
)
def test_bad_folders_are_one_line(folders: list[Path], kind: str, words: str) -> None:
    broken(folders[1], kind)
    with pytest.raises(UserError, match=words) as caught:
        read_runs(folders)
    assert "\n" not in str(caught.value)


def test_a_run_counts_once_and_equal_names_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed0 is named twice"):
        read_runs([folders[0], folders[1], folders[0].parent / "seed1" / ".." / "seed0"])
    twin = make_run(tmp_path / "elsewhere" / "seed0", 7)
    assert [run.label for run in read_runs([folders[0], twin])] == [str(folders[0]), str(twin)]


def test_runs_in_a_store_compare_as_in_directories(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "cache"))
    stored = [f"file://{folder}" for folder in folders]
    assert markdown(read_runs(stored)) == markdown(read_runs(folders))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="seed0 is named twice"):
        read_runs([stored[0], stored[0] + "/"])
    broken(folders[1], "unfinished")
    with pytest.raises(UserError, match="file://.*seed1 is unfinished: it has no evaluation.json"):
        read_runs(stored)
    done = CliRunner().invoke(app, ["compare", stored[0]])
    assert done.exit_code == 0 and done.stdout.startswith("# seed0 (seed 0)")


def test_command(folders: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", "compare", *map(str, folders), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / "compare.md").read_text().removesuffix("\n![curves](curves.png)\n")
    assert done.stdout.startswith(written)
    assert str(tmp_path / "out" / "curves.png") in done.stdout


def test_command_refuses_in_one_line(folders: list[Path]) -> None:
    broken(folders[2], "unfinished")
    done = CliRunner().invoke(app, ["compare", *map(str, folders)])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "seed2 is unfinished" in done.stderr
