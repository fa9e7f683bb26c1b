"""A person ranks a run's answers in a browser; the run goes on by itself, learns from that and says who agrees.

rayrlhf run          sft | samples answers, waits ..................... | reward model, PPO, evaluation, report
rayrlhf label                               | the page
ann, in Chromium                                | ranks all but one by the keyboard, skips that one
bob, another process                                | finds all of them equal
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoModelForSequenceClassification

from rayrlhf.data.comparisons import read_ranked
from rayrlhf.labelling.judgements import dense
from rayrlhf.reports.raters import agreement_of
from rayrlhf.rewards.labellers import Unranked, read_unranked
from rayrlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WAIT_MS = 300_000
"""No test is about speed."""
BOB = """
import sys
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Judgement

database = LabelDatabase(sys.argv[1])
for number, item in enumerate(database.items()):
    ranks = None if number == 0 else (1,) * len(item.answers)
    database.judge(Judgement(item.id, "bob", ranks, skipped="" if ranks else "unsure"), f"bob {item.id}")
"""


def rank_by_length(page: Page, count: int, skip: str) -> None:
    """Rank the answers to `count` prompts, longer ones first; skip the prompt that has the text `skip` among them."""
    for done in range(count):
        expect(page.locator("#standing")).to_contain_text(f"{done} done")
        expect(page.locator(".card:visible").first).to_be_visible()
        texts = page.locator(".card:visible > .text").all_text_contents()
        if skip in texts:
            page.keyboard.press("s")
            page.keyboard.press("1")
        else:
            for rank in dense([-len(text) for text in texts]):
                page.keyboard.press(str(rank))
            page.keyboard.press("Enter")
    expect(page.locator("#standing")).to_contain_text(f"{count} done")


def margins_by(reward_model: Path, waiting: list[Unranked]) -> list[float]:
    """By how much the best answer to each prompt is before the second, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    found = []
    for each in waiting:
        with torch.no_grad():
            scores = [float(model(torch.tensor([[*each.prompt_ids, *ids]])).logits) for ids in each.answer_ids]
        best, second, *_ = sorted(scores, reverse=True)
        found.append(best - second)
    return found


@pytest.mark.long  # a run with its start, and a second start of the actors that had gone while people worked
def test_people_rank_in_a_browser_and_the_run_goes_on_by_itself(finished: Any, tmp_path: Path, start: Any) -> None:
    path = tmp_path / "people"
    shutil.copytree(finished.path / "sft", path / "sft")
    changes = [f"runs_dir={tmp_path}", "name=people", "collect.prompts=12", "collect.labeller.kind=people"]
    changes += ["collect.labeller.labellers=2", "collect.labeller.aggregate=bradley_terry", "rl.steps=1"]
    changes += ["collect.labeller.choose=margin", f"collect.margin_from={finished.path}"]
    run = start("rayrlhf", "run", *finished.arguments, *changes)
    run.wait_for_line(r"collect: 0 of \d+ prompts are ranked; `rayrlhf label ")
    waiting = read_unranked(path / "to_rank.jsonl")
    margins = margins_by(finished.path / "reward_model", waiting)
    assert margins == sorted(margins) and margins[0] < margins[-1], "the closest first"
    label = start("rayrlhf", "label", str(path), "--port", "0", "--labellers", "ann,bob", "--repeats", "0")
    label.wait_for_line("label: each link is for one person")
    assert not (path / "comparisons.parquet").exists()

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium (Debian and Ubuntu: apt install chromium)"
    with sync_playwright() as playwright:
        expect.set_options(timeout=WAIT_MS)
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.set_default_timeout(WAIT_MS)
        link = re.search(r"^label: ann: (\S+)$", label.output(), re.MULTILINE)
        assert link
        page.goto(link.group(1))
        page.get_by_role("link", name="Begin").click()
        rank_by_length(page, len(waiting), waiting[0].answers[0])
        assert run.process.poll() is None and not (path / "comparisons.parquet").exists(), "bob is to come"
        subprocess.run([sys.executable, "-c", BOB, str(path / "labels.sqlite")], cwd=ROOT, check=True)

    outcome = run.wait()
    assert outcome.code == 0, outcome.err
    assert f"1 of {len(waiting)} prompts have no ranking and are left out" in " ".join(outcome.out.split())
    ranked = read_ranked(path / "comparisons.parquet")
    assert [r.id for r in ranked] == [item.id for item in waiting[1:]]
    for record in ranked:
        lengths = [len(text) for text in record.responses]
        assert lengths == sorted(lengths, reverse=True), "bob's ties leave ann's order"
        longer = {(i, j) for i in range(len(lengths)) for j in range(len(lengths)) if lengths[i] > lengths[j]}
        assert set(record.pairs) == longer, "answers of one length are a tie"
    assert json.loads((path / "labeller.json").read_text())["skipped"] == 2
    lines = read_metrics(path, "reward_model")
    assert lines[0]["reward_model/pairs"] == sum(len(r.pairs) for r in ranked if not r.heldout)
    assert [line["step"] for line in read_metrics(path, "rl")] == [1]
    found = {(each.one, each.other): each for each in agreement_of([path])}
    both = found["people", "longer answer"]
    assert both.alike is not None and both.alike.mean == 1.0 and both.pairs == sum(len(r.pairs) for r in ranked)
    assert found["people: ann", "people: bob"].alike is None, "bob prefers nothing"
    assert ("people", "reward model") in found
    assert "<h2>Agreement</h2>" in (path / "report.html").read_text()
