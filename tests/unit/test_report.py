"""The report page: whole or partial runs, nothing from outside, nothing unescaped, curves as written."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Prompt
from rayrlhf.reports.evaluation import Answers, samples_table, summarize, write_evaluation, write_samples
from rayrlhf.reports.measures import PANELS
from rayrlhf.reports.page import stage_figure, write_report
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.metrics import MetricsWriter

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'


class Page(HTMLParser):
    """Tags that open and close in order, the cells of the first table, and all text."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
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


def test_page_of_a_finished_run(tmp_path: Path) -> None:
    run, result = finished_run(tmp_path)
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert sum(tag == "img" for tag, _ in page.tags) == 3
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert str(attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert page.text.count(f"POST: {EVIL}") == 12  # shown as text, for the samples that fit
    assert "max_prompt_tokens: 160" in page.text

    rows = {row[0].strip(): [cell.split() for cell in row[1:]] for row in page.rows}
    heads = ["", "policy ", "SFT ", "reference ", "policy − SFT, paired ", "the same at equal length "]
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
    assert "the same at equal length" in rows


def test_figures_are_valid_svg_that_needs_nothing(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path)
    html = write_report(run).read_text(encoding="utf-8")
    images = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    assert len(images) == 3
    for image in images:
        root = ElementTree.fromstring(base64.b64decode(image))
        assert root.tag.endswith("svg")
        references = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(value.startswith("#") for value in references)


def test_proxy_and_gold_over_kl_where_they_were_measured(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "demo"}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        for step in range(4):
            values = {f"rl/{name}/{kind}": 1.0 + step for name in ("score", "gold") for kind in ("mean", "std")}
            writer.write("rl", step, {**values, "rl/kl": 1.0 * step, "rl/responses": 8})
    images = [tag for tag, _ in Page(write_report(run).read_text(encoding="utf-8")).tags if tag == "img"]
    assert len(images) == 2


def test_curves_hold_the_written_numbers_and_gaps() -> None:
    lines = [{"stage": "rl", "step": s, "rl/kl": None if s == 1 else s * 2.0, "time/learn": 3.0} for s in range(4)]
    lines[2]["time/generate"] = 5.0
    figure = stage_figure("rl", lines)
    assert figure is not None
    kl, seconds = figure.axes
    assert kl.get_title(loc="left") == "KL to the reference policy"
    (curve,) = kl.get_lines()
    assert np.asarray(curve.get_xydata()).tolist() == [[0, 0], [2, 4], [3, 6]]
    assert seconds.get_title(loc="left") == "Seconds by phase"
    assert max(float(np.asarray(area.get_paths()[0].vertices)[:, 1].max()) for area in seconds.collections) == 8.0


@pytest.mark.parametrize("stage", list(PANELS))
def test_no_metrics_no_figure(stage: str) -> None:
    assert stage_figure(stage, []) is None
    assert stage_figure(stage, [{"stage": stage, "step": 0, "other": 1.0}]) is None


def test_partial_runs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "empty")
    run.path.mkdir()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "nothing yet" in page.text
    assert page.open == []

    run = open_or_create(parse_config({"name": "started"}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        writer.write("sft", 1, {"sft/loss": 3.0})
    with run.writing("sft") as temporary:
        (temporary / "config.json").write_text("{}")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "done: sft" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 1


def test_warnings_of_the_steps_are_listed(tmp_path: Path) -> None:
    run = open_or_create(parse_config({"name": "demo", "alarms": {"max_kl": 3.0}}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        for step in range(40):
            writer.write("rl", step + 1, {"rl/kl": step / 10})
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "rl steps 32 to 40: the policy is 3.1 nats a response" in text
    assert "(max_kl 3, 3.1 at first, 3.9 at last)" in text
    assert text.count("nats a response from the reference") == 1, "once, not at every step"

    quiet = open_or_create(parse_config({"name": "quiet"}, "test"), tmp_path)
    with MetricsWriter(quiet.path) as writer:
        writer.write("rl", 0, {"rl/kl": 0.0})
    assert "none: no stage warned" in Page(write_report(quiet).read_text(encoding="utf-8")).text
