"""report.html: whole or partial runs, nothing from outside, markup stays text, curves and samples as written."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.listening import listen
from jobs.report import state
from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Prompt
from rayrlhf.reports.evaluation import Answers, samples_table, summarize, write_evaluation, write_samples
from rayrlhf.reports.measures import PANELS
from rayrlhf.reports.page import write_report
from rayrlhf.reports.page.charts import over_kl_chart, stage_charts, time_charts
from rayrlhf.reports.page.facts import bars, hashes, own_settings
from rayrlhf.reports.page.frame import as_json
from rayrlhf.reports.page.reward_model import binned, calibration_error, reward_model_charts
from rayrlhf.reports.page.samples import differences, evaluated, while_rl_ran
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.metrics import MetricsWriter

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'


class Page(HTMLParser):
    """Tags that open and close in order, the cells of the first table, and all text."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        """What a reader sees without the script."""
        self.data: dict[str, Any] = {}
        """What the script reads."""
        self.code: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.code:
            if ("type", "application/json") in self.tags[-1][1].items():
                self.data = json.loads(data)
            else:
                self.code[self.open[-1]].append(data)
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data + " "


def finished_run(tmp_path: Path) -> tuple[RunFolder, dict[str, Any]]:
    run = open_or_create(parse_config({"name": "demo"}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        for step in range(5):
            writer.write("sft", step, {"sft/loss": 3.0 - step, "sft/rouge1": 0.1 * step})
            writer.write("reward_model", step, {"reward_model/accuracy": 0.5 + 0.1 * step})
        for step in range(6):
            numbers = {m.name: 1.0 + step for panel in PANELS["rl"] for m in panel.measures}
            writer.write("rl", step, {**numbers, "rl/kl": float("nan") if step == 2 else 0.5 * step})
    prompts = [
        Prompt(str(i), f"TITLE: title {i} {EVIL}\n\nPOST: {EVIL}", reference=" a b c", title="a") for i in range(20)
    ]
    n = len(prompts)
    rewards = np.linspace(-20, 0, n)
    sft = Answers("sft", [f" sft {EVIL}"] * n, rewards, rewards / 40, np.full(n, 9), np.full(n, True))
    longer = np.arange(n) % 3 + 9
    policy = Answers("policy", [" a b"] * n, rewards + 2, rewards / 50, longer, np.full(n, True), np.full(n, 4.5))
    reference = Answers("reference", [" a b c"] * n, rewards + 1)
    result = summarize(prompts, sft, policy, reference, None, labeller="file", metadata={"split": "test"}, samples=50)
    write_evaluation(run.evaluation, result)
    write_samples(run.samples, samples_table(prompts, [reference, sft, policy]))
    return run, result


def page_of(run: RunFolder) -> Page:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_page_of_a_finished_run(tmp_path: Path) -> None:
    run, result = finished_run(tmp_path)
    page = page_of(run)
    assert "max_prompt_tokens: 160" in page.text
    assert "done: Evaluation" in page.text

    rows = {row[0].strip(): [cell.split() for cell in row[1:]] for row in page.rows if row}
    heads = ["measure ", "policy ", "SFT ", "reference ", "policy − SFT, paired ", "the same at equal length "]
    assert page.rows[0] == heads
    sft = result["sft"]["reward"]
    want = [f"{sft['mean']:.1f}", f"{sft['low']:.1f}", "to", f"{sft['high']:.1f}"]
    assert rows["reward model's score"][1] == [word.replace("-", "−") for word in want]
    assert rows["reward model's score"][3] == ["2.0", "2.0", "to", "2.0", "p", "<", "0.001"]
    assert rows["reward model's score"][4] == ["2.0", "2.0", "to", "2.0"]
    assert rows["ROUGE-1"][4] == ["–"]
    assert rows["KL to SFT, nats per response"] == [["4.500", "4.500", "to", "4.500"], *[["–"]] * 4]
    assert rows["win rate against SFT"][0][0] == "1.000"
    assert rows["win rate against SFT by gold"][0][0] == f"{19.5 / 20:.3f}"  # all gains but the last, which is a tie
    assert "Too little evidence: gold compares 20 prompts" in page.text


def test_nothing_is_asked_of_any_host_and_only_the_pages_own_code_runs(tmp_path: Path) -> None:
    page = page_of(finished_run(tmp_path)[0])
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert str(attributes.get("src") or "data:").startswith("data:")
        assert str(attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    allowed = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert allowed["default-src"] == allowed["connect-src"] == "'none'"
    for name in ("script", "style"):
        (code,) = page.code[name]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert allowed[f"{name}-src"] == f"'sha256-{digest}'", "else the browser would refuse it"


def test_library_and_code_stay_small(tmp_path: Path) -> None:
    page = page_of(finished_run(tmp_path)[0])
    assert sum(len(code) for each in page.code.values() for code in each) < 200_000
    assert "uPlot" in page.code["script"][0] and "https://github.com/leeoniya/uPlot" in page.code["script"][0]


def test_markup_in_prompts_and_answers_stays_text(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path)
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert html.count("<script") == 2 and html.count("</script") == 2
    (collection,) = page.data["samples"]
    assert len(collection["rows"]) == 20, "all of them"
    row = collection["rows"][3]
    assert row["prompt"] == f"TITLE: title 3 {EVIL}\n\nPOST: {EVIL}"
    assert "".join(row["answers"]["sft"]["parts"]) == f"sft {EVIL}"
    assert json.loads(as_json({"a": "</script><!--", "b": float("nan")})) == {"a": "</script><!--", "b": None}
    assert "<" not in as_json("</script><!--")


def test_curves_hold_the_written_numbers_and_gaps() -> None:
    lines = [{"stage": "rl", "step": s, "rl/kl": None if s == 1 else s * 2.0, "time/learn": 3.0} for s in range(4)]
    lines[2] |= {"time/generate": 5.0, "idle/learner": 0.25}
    (kl,) = stage_charts("rl", lines)
    assert (kl.title, kl.unit, kl.sync) == ("KL to the reference policy", "nats per response", "rl")
    assert kl.x == [0, 2, 3] and [each.values for each in kl.series] == [[0, 4, 6]]
    assert kl.summary == "KL to the reference policy. KL: 0 at step 0, 6 at step 3; least 0, most 6."
    seconds, idle = time_charts(lines)
    assert seconds.kind == "stacked" and seconds.x == [0, 1, 2, 3]
    assert {each.words: each.values for each in seconds.series} == {
        "generate": [None, None, 5.0, None], "learn": [3.0] * 4
    }  # fmt: skip
    assert [(each.words, each.values) for each in idle.series] == [("learner", [0.25])]


@pytest.mark.parametrize("stage", list(PANELS))
def test_no_metrics_no_charts(stage: str) -> None:
    assert stage_charts(stage, []) == []
    assert stage_charts(stage, [{"stage": stage, "step": 0, "other": 1.0}]) == []


def test_proxy_and_gold_over_kl_where_they_were_measured(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "demo"}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        for step in range(4):
            values = {f"rl/{name}/{kind}": 1.0 + step for name in ("score", "gold") for kind in ("mean", "std")}
            writer.write("rl", step, {**values, "rl/kl": 1.0 * step**2, "rl/responses": 16})
    chart = page_of(run).data["charts"][0]
    assert chart["title"] == "Proxy and gold against KL" and chart["x"] == [0, 1, 2, 3]
    for each in chart["series"]:
        assert each["values"] == [0, 1, 2, 3], "in standard deviations of the first step, which is 1"
        half = [1.959964 * (1 + step) / 4 for step in range(4)]
        assert each["high"] == pytest.approx([step + h for step, h in enumerate(half)], abs=1e-5)
    assert over_kl_chart([{"step": 0, "rl/kl": 1.0}]) is None


def test_words_that_differ_are_cut_out() -> None:
    old, new, share = differences("the cat sat on the mat", "the dog sat on a mat")
    assert old == ["the", " cat", " sat on", " the", " mat"] and new == ["the", " dog", " sat on", " a", " mat"]
    assert share == pytest.approx(1 - 2 * 4 / 12)
    assert differences("x y", "x y") == (["x y"], ["x y"], 0.0)
    assert differences("", "a b") == ([""], ["", "a b"], 1.0)
    assert differences("你好吗", "你好吧")[:2] == (["你好", "吗"], ["你好", "吧"])
    assert differences("a\n b", "a b") == (["a\n b"], ["a b"], 0.0), "blanks do not count"


def test_rows_have_their_gain_and_their_change() -> None:
    row = {
        "id": "a", "post": "TITLE: t\n\nPOST: p", "reference": None, "sft": " one two", "policy": " one three",
        "gold_sft": 0.25, "gold_policy": 0.5, "length_policy": 3.0, "eos_rate_policy": 0.0, "eos_rate_sft": 1.0,
    }  # fmt: skip
    found = evaluated([row, row | {"id": "b", "gold_policy": None}])
    assert found is not None and (found.measure, found.old, found.new) == ("gold", "sft", "policy")
    first, second = found.rows
    assert (first.head, first.gain, first.change, first.length) == ("t", 0.25, 0.5, 3.0)
    assert second.gain is None and set(first.answers) == {"sft", "policy"}
    assert first.answers["policy"].parts == ["one", " three"] and not first.answers["policy"].ended
    assert first.answers["sft"].numbers == {"gold": 0.25} and first.answers["sft"].ended
    assert evaluated([]) is None


def test_looks_that_differ_in_their_prompts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.dev_samples.mkdir()
    for step, ids in ((0, "ab"), (10, "abc")):
        rows = [{"step": step, "id": i, "prompt": i, "answer": f"{i} {step}", "score": 1.0, "gold": None} for i in ids]
        (run.dev_samples / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = while_rl_ran(run, None)
    assert found is not None and (found.old, found.new, found.measure) == ("step 0", "step 10", "score")
    assert [(row.id, list(row.answers), row.gain) for row in found.rows] == [
        ("a", ["step 0", "step 10"], 0.0), ("b", ["step 0", "step 10"], 0.0), ("c", ["step 10"], None)
    ]  # fmt: skip


# ---- the reward model


def test_bins_and_calibration_by_hand() -> None:
    """Forty pairs of margin ln 3, whose confidence is 3/4, and of which 30 are right; forty of margin 0, all ties."""
    margins = np.array([np.log(3)] * 30 + [-np.log(3)] * 10 + [0.0] * 40)
    right = np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))
    assert calibration_error(margins, right, bins=2) == pytest.approx(0.0)
    assert calibration_error(np.abs(margins) * 0, right, bins=1) == pytest.approx(abs(0.5 - (30 + 20) / 80))
    low, high = binned(np.abs(margins), right, np.arange(80), bins=2)
    assert (low.at, low.share, low.n) == (0.0, 0.5, 40) and (low.low, low.high) == (0.5, 0.5)
    assert high.at == pytest.approx(np.log(3)) and (high.share, high.n) == (0.75, 40)
    assert 0.55 < high.low < 0.7 and 0.8 < high.high < 0.95
    assert calibration_error(margins[:19], right[:19]) is None and binned(margins[:19], right[:19], np.arange(19)) == []


def test_charts_of_heldout_pairs() -> None:
    rows = [{"prompt": n // 4, "reward_model": (n % 10 - 3) / 4, "longer": float(n % 7 - 3)} for n in range(200)]
    charts, said = reward_model_charts(rows)
    assert [chart.title for chart in charts] == ["Calibration", "Accuracy by margin", "Accuracy by length", "Margins"]
    assert sum(value or 0 for value in charts[-1].series[0].values) == 200
    assert "share ordered rightly 0.650" in said[0]  # six of ten margins are positive, one is 0
    assert "neither over- nor under-confident" in said[1]
    for size, words in ((9.0, "is over-confident"), (0.01, "is under-confident")):  # of margins; the shares stay
        wrong = [row | {"reward_model": size * (1 if n % 3 else -1)} for n, row in enumerate(rows)]
        assert words in reward_model_charts(wrong)[1][1]
    short = [row | {"longer": -row["reward_model"]} for row in rows]
    assert reward_model_charts(short)[1][2].endswith("difference in length: −1.00.")
    few, told = reward_model_charts(rows[:11])
    assert [chart.title for chart in few] == ["Margins"] and "too few for calibration" in told[1]
    assert reward_model_charts([]) == ([], [])


# ---- how it was made


def test_only_settings_that_differ_are_listed() -> None:
    config = parse_config({"name": "demo", "seed": 3, "rl": {"algorithm": "grpo", "steps": 7}}, "test")
    found = {each.key: (each.value, each.default) for each in own_settings(config)}
    assert found["seed"] == ("3", "0") and found["rl.steps"][0] == "7"
    assert found["name"] == ("demo", "")
    assert "rl.temperature" not in found and "rl.algorithm" not in found and "runs_dir" not in found
    assert not [each for each in own_settings(parse_config({"name": "demo"}, "test")) if each.key != "name"]


def test_stages_on_a_line_of_time() -> None:
    lines = [
        {"stage": "run", "step": 0, "time": 110.0, "time/sft": 10.0},
        {"stage": "rl", "step": 1, "time": 150.0},
        {"stage": "run", "step": 4, "time": 200.0, "time/rl": 80.0},
    ]
    assert [(b.title, b.left, b.width, b.seconds) for b in bars(lines)] == [
        ("Supervised fine-tuning", 0.0, 0.1, "10 s"), ("RL", 0.2, 0.8, "1 min 20 s")
    ]  # fmt: skip
    assert bars(lines[1:2]) == []
    found = {"data.x.path": {"path": "/p", "files": {"p": {"bytes": 1, "blake2b": "5f0c"}}}}
    assert hashes(found) == [("data.x.path", "p", "5f0c")]


# ---- the command, and unfinished runs


def test_command_writes_the_page_or_says_in_one_line_why_not(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "started"}, "test"), tmp_path)
    done = CliRunner().invoke(app, ["report", str(run.path)])
    assert done.exit_code == 0 and "No verdict yet" in run.report.read_text(encoding="utf-8")
    nothing = CliRunner().invoke(app, ["report", str(tmp_path / "two")])
    assert nothing.exit_code == 2 and "no run folder" in nothing.output
    (run.path / "rounds.json").write_text('{"begun": 1, "stopped": null}')
    rounds = CliRunner().invoke(app, ["report", str(run.path), "--watch"])
    assert rounds.exit_code == 2 and "name one of them, such as" in " ".join(rounds.output.split())
    (run.path / "rounds.json").unlink()
    with listen("127.0.0.1", 0, "report") as taken:
        port = str(taken.getsockname()[1])
        refused = CliRunner().invoke(app, ["report", str(run.path), "--watch", "--port", port])
    assert refused.exit_code == 2 and "report: cannot listen at 127.0.0.1" in " ".join(refused.output.split())


def test_the_state_changes_with_what_the_page_shows(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "started"}, "test"), tmp_path)
    seen = [state(run)]
    with MetricsWriter(run.path) as writer:
        writer.write("sft", 1, {"sft/loss": 3.0})
    seen.append(state(run))
    run.evaluation.write_text("{}")
    seen.append(state(run))
    run.dev_samples.mkdir()
    (run.dev_samples / "step_000000.jsonl").write_text("")
    seen.append(state(run))
    write_report(run)
    assert len(set(seen)) == 4 and state(run) == seen[-1], "the page itself is no news"


def test_partial_runs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "empty")
    run.path.mkdir()
    page = page_of(run)
    assert "nothing yet" in page.text and "No verdict yet" in page.text

    run = open_or_create(parse_config({"name": "started"}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        writer.write("sft", 1, {"sft/loss": 3.0})
    with run.writing("sft") as temporary:
        (temporary / "config.json").write_text("{}")
    page = page_of(run)
    assert "done: Supervised fine-tuning" in page.text
    assert [chart["title"] for chart in page.data["charts"]] == ["Loss"]


def test_warnings_of_the_steps_are_listed(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "demo", "alarms": {"max_kl": 3.0}}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        for step in range(40):
            writer.write("rl", step + 1, {"rl/kl": step / 10})
    text = " ".join(page_of(run).text.split())
    assert "rl steps 32 to 40 the policy is 3.1 nats a response" in text
    assert "(max_kl 3, 3.1 at first, 3.9 at last)" in text
    assert text.count("nats a response from the reference") == 1, "once, not at every step"

    quiet = open_or_create(parse_config({"name": "quiet"}, "test"), tmp_path)
    with MetricsWriter(quiet.path) as writer:
        writer.write("rl", 0, {"rl/kl": 0.0})
    assert "none: no stage warned" in page_of(quiet).text
