"""report.html in Debian's Chromium, without a network: what a reader sees, searches, sorts and zooms to.

Every test also shows that nothing was asked of any host and that the browser refused nothing.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from jobs.listening import listen
from jobs.report import application
from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Prompt
from rayrlhf.reports.evaluation import Answers, samples_table, summarize, write_evaluation, write_samples
from rayrlhf.reports.page import write_report
from rayrlhf.reports.reward_accuracy import write_accuracy
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.metrics import MetricsWriter
from tests.unit.test_reward_accuracy import planted

EVIL = '</script><script>document.title="taken"</script><img src="https://elsewhere.invalid/x.png" onerror="alert(1)">'
PROMPTS = 47
STEPS = 60
WAIT_MS = 10_000
"""No test is about speed."""
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PLOT = "[...Curves.plots.values()].find(own => own.chart.title === {title!r})"


def write_steps(run: RunFolder, first: int, last: int) -> None:
    with MetricsWriter(run.path) as writer:
        for step in range(first, last + 1):
            gold = min(step, 2 * STEPS / 3) - max(0.0, step - 2 * STEPS / 3)
            numbers = {"rl/score/mean": 0.1 * step, "rl/gold/mean": 0.01 * gold, "rl/kl": 0.2 * step}
            spread = {"rl/score/std": 0.2, "rl/gold/std": 0.05, "rl/responses": 64, "time/learn": 2.0, "time/step": 3.0}
            writer.write("rl", step, numbers | spread)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose answers are numbered, and one of whose prompts is markup."""
    run = open_or_create(parse_config({"name": "demo"}, "test"), tmp_path_factory.mktemp("runs"))
    write_steps(run, 1, STEPS)
    n = PROMPTS
    heads = [f"TITLE: title {i}\n\nPOST: a post" if i else f"TITLE: {EVIL}\n\nPOST: x" for i in range(n)]
    prompts = [Prompt(f"p{i}", head, reference=f"people {i}", title="t") for i, head in enumerate(heads)]
    order = np.arange(n)
    gold = np.zeros(n)
    sft = Answers("sft", [f" the old answer {i}" for i in range(n)], gold, gold, np.full(n, 9), np.full(n, True))
    # The gain of prompt i is (i * 10) % 47: number 33 has the least but 0, number 14 the most.
    texts = [f" the new {'answer ' * (i % 4)}{i}" if i else f" {EVIL}" for i in range(n)]
    policy = Answers("policy", texts, gold, (order * 10 % n) / 100, order + 5, np.full(n, True), np.full(n, 4.5))
    reference = Answers("reference", [f" people {i}" for i in range(n)])
    result = summarize(prompts, sft, policy, reference, None, labeller="file", metadata={}, samples=50)
    write_evaluation(run.evaluation, result)
    write_samples(run.samples, samples_table(prompts, [reference, sft, policy]))
    write_accuracy(run.heldout_pairs, run.reward_accuracy, planted(), {}, samples=50, seed=0)
    run.dev_samples.mkdir()
    for step in (0, 30, 60):
        row: dict[str, Any] = {
            "step": step,
            "id": "d0",
            "prompt": "TITLE: dev",
            "reference": "ref",
            "answer": f"after {step}",
        }
        row |= {"score": 0.5, "gold": step / 100, "tokens": 3, "ended": True}
        (run.dev_samples / f"step_{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    look: dict[str, Any] = {
        "step": 60,
        "id": "t0",
        "prompt": "p",
        "score": 0.5,
        "ended": False,
        "tokens": [" a", "</script>"],
    }
    look |= {"logprobs": [-1.0, -2.0], "ref_logprobs": [-1.5, -1.0], "advantages": [0.5, -1.0], "values": [0.1, None]}
    run.tokens.write_text(json.dumps(look) + "\n")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "these tests need Chromium (Debian and Ubuntu: apt install chromium); `make test` installs it"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, run: RunFolder) -> Iterator[Open]:
    """Opens the file, with these options of a browser's context."""
    expect.set_options(timeout=WAIT_MS)
    asked: list[str] = []
    wrong: list[str] = []
    contexts = []

    def make(url: str = f"file://{run.report}", **options: Any) -> Page:
        context = browser.new_context(offline=url.startswith("file:"), **options)
        context.set_default_timeout(WAIT_MS)
        context.on("request", lambda request: asked.append(request.url))
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        contexts.append(context)
        page = context.new_page()
        page.goto(url)
        expect(page.locator(".sample").first).to_be_visible()
        return page

    yield make
    for context in contexts:
        context.close()
    assert {url.split("#")[0] for url in asked if not url.startswith("http://127.0.0.1:")} <= {f"file://{run.report}"}
    assert wrong == []


def heads(page: Page) -> list[str]:
    return page.locator("#rows h3").all_inner_texts()


def test_samples_are_searched_sorted_and_paged(opened: Open) -> None:
    page = opened()
    assert page.title() == "demo · rayrlhf" and heads(page)[1:4] == ["title 1", "title 2", "title 3"]
    expect(page.locator("#page")).to_have_text("Page 1 of 5")
    # Markup is text, in headlines and in answers.
    assert heads(page)[0].startswith('</script><script>document.title="taken"')
    assert page.locator(".sample").first.locator(".answer.new .text").inner_text() == EVIL
    second = page.locator(".sample").nth(1)
    expect(second.locator(".answer h4")).to_contain_text(["reference", "SFT", "policy"])
    expect(second.locator("del")).to_have_text(["old"])
    expect(second.locator("ins")).to_have_text(["new"])

    page.get_by_role("button", name="Next").click()
    assert heads(page)[0] == "title 10" and len(heads(page)) == 10
    page.get_by_role("button", name="Best").click()
    expect(page.locator("#page")).to_have_text("Page 1 of 5")
    assert heads(page)[0] == "title 14"  # 140 % 47 = 46
    expect(page.locator(".sample").first.locator(".tag").first).to_have_text("gold +0.460")
    page.get_by_label("Sort").select_option("loss")
    assert heads(page)[1] == "title 33"  # 330 % 47 = 1; number 0 gains nothing
    page.get_by_label("Sort").select_option("longest")
    assert heads(page)[0] == "title 46"
    page.get_by_role("button", name="Random").click()
    drawn = heads(page)
    page.reload()
    page.get_by_role("button", name="Random").click()
    assert heads(page) == drawn and drawn != sorted(drawn), "one order for one seed"

    page.get_by_label("Search").fill("people 12")
    expect(page.locator("#counted")).to_have_text("1 of 47 prompts")
    assert heads(page) == ["title 12"]
    page.get_by_label("Search").fill("no such words")
    expect(page.locator("#counted")).to_have_text("0 of 47 prompts")
    assert heads(page) == []
    page.get_by_role("button", name="While rl ran").click()
    page.get_by_label("Search").fill("")
    expect(page.locator(".answer h4")).to_contain_text(["reference", "step 0", "step 30", "step 60"])
    expect(page.locator(".answer ins")).to_have_text(["60"])


def test_curves_are_read_zoomed_and_smoothed(opened: Open) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    gold = PLOT.format(title="Gold: labeller's own measure")
    figure = page.locator("figure", has=page.get_by_role("heading", name="Gold: labeller's own measure"))
    expect(figure.locator(".u-value").first).to_have_text("60")  # without a pointer, the last step
    plot = figure.get_by_role("img")
    box = figure.locator(".u-over").bounding_box()
    assert box is not None
    figure.locator(".u-over").hover(position={"x": box["width"] * 30 / 59, "y": 50})
    expect(figure.locator(".u-value").first).to_have_text("31")
    score = page.locator("figure", has=page.get_by_role("heading", name="Proxy: reward model's score"))
    expect(score.locator(".u-value").first).to_have_text("31")  # all charts of a stage at once
    expect(score.locator(".u-series:not(.raw) .u-value").nth(1)).to_have_text("3.100")

    figure.locator(".u-over").scroll_into_view_if_needed()
    box = figure.locator(".u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=4)
    page.mouse.up()
    least, most = page.evaluate(f"[{gold}.plot.scales.x.min, {gold}.plot.scales.x.max]")
    assert 14 < least < 18 and 29 < most < 32
    page.mouse.dblclick(box["x"] + 20, box["y"] + 40)
    assert page.evaluate(f"[{gold}.plot.scales.x.min, {gold}.plot.scales.x.max]") == [1, 60]

    plot.focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(figure.locator("[aria-live]")).to_have_text("step 3: gold 0.03000")
    page.keyboard.press("+")
    assert page.evaluate(f"{gold}.plot.scales.x.max") < 40
    page.keyboard.press("Escape")
    assert page.evaluate(f"{gold}.plot.scales.x.max") == 60
    assert "Gold: labeller's own measure. gold: 0.01 at step 1, 0.2 at step 60; least 0.01, most 0.4." in str(
        plot.get_attribute("aria-label")
    )

    # Around the peak at step 40, a mean of five steps is 0.4 - (2 * 0.02 + 2 * 0.01) / 5.
    column = "own => own.plot.data[2][39]"
    assert page.evaluate(f"({column})({gold})") == pytest.approx(0.388)
    page.get_by_label("Smoothing").fill("0")
    expect(page.locator("#window")).to_have_text("none")
    assert page.evaluate(f"({column})({gold})") == pytest.approx(0.4)
    figure.get_by_text("Numbers").click()
    expect(figure.locator("details tbody tr")).to_have_count(60)
    assert figure.locator("details tbody tr").nth(39).inner_text().split() == ["40", "0.4000"]
    expect(page.locator(".findings .bad").first).to_contain_text("Over-optimised from step 40 on")


def test_tokens_say_what_was_learnt_from_them(opened: Open) -> None:
    page = opened()
    tokens = page.locator(".strip span")
    expect(tokens).to_have_text([" a", "</script>"])
    tokens.nth(1).hover()
    said = "“</script>”: advantage −1, log-prob minus reference −1, log-prob −2, reference log-prob −1, value –"
    expect(page.locator("#token")).to_have_text(said)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    # The advantage of the second token is twice the first one's and of the other sign: 70 and 35 % of two colours.
    shades = page.evaluate("[...document.querySelectorAll('.strip span')].map(each => each.style.background)")
    assert "--s0) 35%" in shades[0] and "--s1) 70%" in shades[1]
    page.get_by_label("Colour by").select_option(label="value")
    assert "70%" in page.evaluate("document.querySelector('.strip span').style.background")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(opened: Open, scheme: Any) -> None:
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    assert page.evaluate(WIDE) == 0, "nothing sticks out"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(245, 246, 249)", "dark": "rgb(20, 22, 27)"}[scheme]
    # Charts have the colours of the scheme, too: the blue of their first curve is lighter on dark.
    blue = f"{PLOT.format(title='KL to the reference policy')}.plot.series[2].stroke()"
    assert page.evaluate(blue) == {"light": "rgb(0, 114, 178)", "dark": "rgb(86, 180, 233)"}[scheme]
    page.get_by_role("button", name="Next").tap()
    assert heads(page)[0] == "title 10"
    page.emulate_media(media="print")
    expect(page.locator(".bar")).to_be_hidden()
    expect(page.locator(".headline")).to_be_visible()
    assert page.evaluate(blue) == "rgb(0, 114, 178)", "paper is white"


def test_every_control_has_a_name_for_a_screen_reader(opened: Open) -> None:
    page = opened()
    tree = page.locator("body").aria_snapshot()
    for words in (
        'navigation "Sections"', 'heading "demo" [level=1]', 'searchbox "Search"', 'combobox "Sort"',
        'slider "Smoothing"', 'checkbox "raw points"', 'article "title 1"', 'button "Most changed"',
    ):  # fmt: skip
        assert words in tree, (words, tree)
    bare = ("- button", "- link", "- textbox", "- checkbox", "- slider", "- combobox", "- img")
    assert not [line for line in tree.splitlines() if line.strip() in bare]


def test_watched_page_follows_the_run_and_stays_where_the_reader_is(
    opened: Open, run: RunFolder, tmp_path: Path
) -> None:
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "demo"))
    with listen("127.0.0.1", 0, "report") as listening:
        server = uvicorn.Server(uvicorn.Config(application(copy), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            page = opened(f"http://127.0.0.1:{listening.getsockname()[1]}/")
            page.get_by_role("button", name="Next").click()
            page.get_by_text("config.yaml").click()
            kl = PLOT.format(title="KL to the reference policy")
            page.evaluate(f"{kl}.plot.setScale('x', {{min: 10, max: 20}})")
            page.evaluate("scrollTo(0, 2000)")
            look: dict[str, Any] = {
                "step": 65,
                "id": "d0",
                "prompt": "TITLE: dev",
                "reference": "ref",
                "answer": "after 65",
            }
            look |= {"score": 0.5, "gold": 0.65, "tokens": 3, "ended": True}
            (copy.dev_samples / "step_000065.jsonl").write_text(json.dumps(look) + "\n")
            write_steps(copy, STEPS + 1, STEPS + 5)
            expect(page.locator("#rl small")).to_have_text("65 steps")
            assert page.evaluate(f"{kl}.chart.x.length") == 65
            assert page.evaluate(f"[{kl}.plot.scales.x.min, {kl}.plot.scales.x.max]") == [10, 20]
            assert page.evaluate("scrollY") == 2000 and heads(page)[0] == "title 10"
            assert page.locator("#yaml").get_attribute("open") is not None
            expect(page.get_by_role("button", name="While rl ran: 1 dev prompts, 4 looks")).to_be_visible()
            # Another site's name that leads here gets nothing.
            answer = page.request.get(page.url, headers={"Host": "elsewhere.invalid"}, fail_on_status_code=False)
            assert answer.status == 400
        finally:
            server.should_exit = True
            thread.join()
