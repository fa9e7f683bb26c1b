"""The ranking page in Debian's Chromium: what people do there, and what the database then holds.

One browser serves all tests, and each has a server of its own in a thread. Every test also shows that nothing was asked
of another host and that the browser refused nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from rayrlhf.labelling.assignment import Assigner
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.labelling.web.app import Site, application
from rayrlhf.labelling.web.security import Tokens

CHANGED = """before => !document.body.classList.contains("busy") && before !=
    [...document.querySelectorAll(".card:not([hidden]) > .text")].map(text => text.innerText).join()"""
"""Whether other answers are on the page, and it is ready for a key."""
WAIT_MS = 60_000
"""No test is about speed."""
LOST = "net::ERR_INTERNET_DISCONNECTED"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "these tests need Chromium (Debian and Ubuntu: apt install chromium); `make test` installs it"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


class Desk:
    """A server of some items, and the browsers of people who rank them."""

    def __init__(self, browser: Browser, directory: Path, items: Sequence[Item], **options: Any) -> None:
        self.browser, self.contexts, self.asked, self.wrong = browser, [], [], []  # type: ignore[var-annotated]
        self.expected = [LOST]
        """Words of what a browser may complain about."""
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.database = LabelDatabase(directory / "labels.sqlite")
        self.database.add_items(items)
        for name in ("ann", "bob"):
            self.database.add_labeller(name)
        assigner = Assigner(self.database, repeats=0.0)
        tokens = Tokens.read(directory / "secret")
        self.site = Site(self.database, tokens, assigner, "a run", "Rank **well**.", self.url, **options)
        self.server = uvicorn.Server(uvicorn.Config(application(self.site), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()  # requests wait in the socket until it is ready

    def context(self, **options: Any) -> BrowserContext:
        context = self.browser.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        context.on("request", lambda request: self.asked.append(request.url))
        context.on("weberror", lambda error: self.wrong.append(str(error.error)))
        context.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.contexts.append(context)
        return context

    def sit_down(self, name: str = "ann", **options: Any) -> Page:
        """Somebody opens their link and begins."""
        page = self.context(**options).new_page()
        page.goto(self.site.link(name))
        expect(page.get_by_role("link", name="Begin")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator(".card").first).to_be_visible()
        return page

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        self.server.should_exit = True
        self.thread.join()
        self.database.close()


@pytest.fixture
def desk(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Makes a `Desk`."""
    expect.set_options(timeout=WAIT_MS)
    with contextlib.ExitStack() as stack:
        made: list[Desk] = []

        def make(items: Sequence[Item], **options: Any) -> Desk:
            made.append(Desk(browser, tmp_path, items, **options))
            stack.callback(made[-1].close)
            return made[-1]

        yield make
        for each in made:
            assert each.asked and not [url for url in each.asked if not url.startswith(f"{each.url}/")]
            assert not [said for said in each.wrong if not any(words in said for words in each.expected)]


def item(number: int = 0, answers: int = 3) -> Item:
    return Item(f"p{number}", f"Prompt {number}", tuple(f"Answer {number}.{index}" for index in range(answers)))


def answers(page: Page) -> list[str]:
    """The visible answers, from the top."""
    return page.locator(".card:visible > .text").all_inner_texts()


def done(page: Page, count: int) -> None:
    """Wait until the page says that so many items are judged."""
    expect(page.locator("#standing")).to_contain_text(f"{count} done")


def by_answer(judgement: Judgement, items: Sequence[Item]) -> dict[str, int]:
    """The rank of each answer by its text."""
    texts = next(each.answers for each in items if each.id == judgement.item)
    assert judgement.ranks is not None
    return dict(zip(texts, judgement.ranks, strict=True))


def test_keyboard_alone(desk: Any) -> None:
    items = [item(n) for n in range(4)]
    at = desk(items)
    page = at.sit_down()
    shown = answers(page)
    page.keyboard.press("2")
    expect(page.locator(".card.marked .letter")).to_have_text("B")  # goes on to the next one
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_have_text("No rank yet: B, C")
    page.keyboard.press("1")
    page.keyboard.press("2")
    expect(page.get_by_label("Answer C, rank 2 of 3")).to_be_focused()
    expect(page.locator("#said")).to_contain_text("rank 2, tied with A. All ranked")
    page.keyboard.press("Enter")
    done(page, 1)
    shown_next = answers(page)
    # Arrows: the last answer from no rank to 1, 2, 3 and back to 2. Then B is 1, and A is 1, none and 3.
    for key in [*["ArrowDown"] * 2, *["ArrowRight"] * 3, "ArrowLeft", "ArrowUp", "1", "1", "0", "3"]:
        page.keyboard.press(key)
    page.keyboard.press("n")
    page.keyboard.type("3 reasons: usf")  # letters and digits of a note are no commands
    page.keyboard.press("Escape")
    page.keyboard.press("f")
    page.keyboard.press("1")
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    expect(page.locator(".card.marked .tag")).to_have_text(["Harmful", "Personal data"])
    page.keyboard.press("p")
    page.keyboard.press("f")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    done(page, 2)
    page.keyboard.press("s")
    page.keyboard.press("2")
    done(page, 3)
    page.keyboard.press("s")
    page.locator("#reason").press("Tab")
    page.locator("#reason").fill("no 1 time")
    page.locator("#reason").press("Enter")
    expect(page.get_by_role("heading", name="Nothing is left for you")).to_be_visible()
    first, second, third, fourth = at.database.judgements()
    assert by_answer(first, items) == dict(zip(shown, (2, 1, 2), strict=True))
    assert by_answer(second, items) == dict(zip(shown_next, (3, 1, 2), strict=True))
    marked = items[1].answers.index(shown_next[0])
    assert second.flags == tuple(sorted((f"harmful:{marked}", f"personal_data:{marked}", "nonsense:prompt")))
    assert second.note == "3 reasons: usf" and second.seconds > 0
    assert (third.ranks, third.skipped, fourth.skipped) == (None, "Too long", "no 1 time")


def test_drag_and_ties(desk: Any) -> None:
    items = [item()]
    at = desk(items)
    page = at.sit_down(viewport={"width": 1200, "height": 800})
    shown = answers(page)

    def drag(letter: str, rank: int) -> None:
        source = page.locator(f".slots [data-drag]:text-is('{letter}')").bounding_box()
        target = page.locator(f".slot[data-rank='{rank}']").bounding_box()
        assert source and target
        page.mouse.move(source["x"] + 5, source["y"] + 5)
        page.mouse.down()
        page.mouse.move(target["x"] + 20, target["y"] + 20, steps=3)
        expect(page.locator(".slot.over")).to_have_attribute("data-rank", str(rank))
        page.mouse.up()

    drag("A", 1)
    drag("B", 3)
    drag("C", 3)
    expect(page.locator(".slot.tie")).to_have_attribute("data-rank", "3")
    drag("A", 0)
    expect(page.locator(".slot.pool .chip")).to_have_text("A")
    page.locator(".card").nth(0).locator("[data-drag]").hover()  # the letter of an answer can be dragged, too
    page.mouse.down()
    page.locator(".slot[data-rank='2']").hover()
    page.mouse.up()
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#nothing")).to_be_visible()
    assert by_answer(at.database.judgements()[0], items) == dict(zip(shown, (1, 2, 2), strict=True))


def test_undo_goes_back_key_by_key_and_then_item_by_item(desk: Any) -> None:
    items = [item(n) for n in range(2)]
    at = desk(items)
    page = at.sit_down()
    shown = answers(page)
    for key in ("3", "1", "u", "2", "1", "Enter"):
        page.keyboard.press(key)
    done(page, 1)
    page.keyboard.press("1")
    page.keyboard.press("u")
    expect(page.locator(".card.ranked")).to_have_count(0)
    page.keyboard.press("u")
    done(page, 0)
    expect(page.locator(".card [aria-pressed=true]")).to_have_text(["3", "2", "1"])
    page.locator(".card").nth(2).get_by_role("button", name="Rank 2").click()
    page.keyboard.press("Enter")
    done(page, 1)
    (kept,) = at.database.judgements()
    assert by_answer(kept, items) == dict(zip(shown, (2, 1, 1), strict=True))
    assert at.database.written() == 3


def test_two_labellers_at_once(desk: Any) -> None:
    items = [item(n) for n in range(6)]
    at = desk(items)
    pages = [at.sit_down("ann"), at.sit_down("bob")]
    for count in (1, 2, 3):
        assert len({page.locator("#turns").inner_text() for page in pages}) == 2  # never the same one
        for page in pages:
            for key in ("1", "2", "3", "Enter"):
                page.keyboard.press(key)
            done(page, count)
    for page in pages:
        expect(page.locator("#nothing")).to_be_visible()
    assert at.database.progress() == {each.id: 1 for each in items}
    assert sorted(judgement.labeller for judgement in at.database.judgements()) == ["ann"] * 3 + ["bob"] * 3


def test_a_lost_connection_costs_no_judgement(desk: Any) -> None:
    items = [item(n) for n in range(3)]
    at = desk(items)
    page = at.sit_down()
    shown = answers(page)
    page.context.set_offline(True)
    for key in ("3", "2", "1", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#banner")).to_contain_text("Not saved yet: no connection")
    page.keyboard.press("1")  # nothing changes while it waits
    assert at.database.written() == 0
    page.context.set_offline(False)
    done(page, 1)
    expect(page.locator("#banner")).to_be_hidden()
    # Two pages are closed while they wait: the next one sends what they could not, in its order.
    tabs = [page, page.context.new_page()]
    tabs[1].goto(at.url)
    expect(tabs[1].locator(".card").first).to_be_visible()
    page.context.set_offline(True)
    for tab, ranks in zip(tabs, ("123", "321"), strict=True):
        for key in (*ranks, "Enter"):
            tab.keyboard.press(key)
        expect(tab.locator("#banner")).to_be_visible()
    for tab in tabs:
        tab.close()
    page = page.context.new_page()
    page.context.set_offline(False)
    page.goto(at.url)
    done(page, 2)
    assert at.database.written() == 3
    shown_second = [items[1].answers[index] for index in at.database.judgements()[1].shown]
    assert by_answer(at.database.judgements()[1], items) == dict(zip(shown_second, (3, 2, 1), strict=True))
    # A reload in the middle of an item loses nothing either.
    page.keyboard.press("2")
    page.reload()
    expect(page.locator(".card [aria-pressed=true]")).to_have_text("2")
    assert [j.item for j in at.database.judgements()] == ["p0", "p1"]
    assert by_answer(at.database.judgements()[0], items) == dict(zip(shown, (3, 2, 1), strict=True))
    # Nor does a browser that keeps nothing, as one whose store is full.
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    for key in ("1", "2", "3", "Enter"):
        page.keyboard.press(key)
    done(page, 3)
    assert at.database.judgements()[2].item == "p2"


def test_the_back_button_shows_the_earlier_item_to_change_it(desk: Any) -> None:
    items = [item(n) for n in range(2)]
    at = desk(items)
    page = at.sit_down()
    shown = answers(page)
    for key in ("1", "2", "3", "Enter"):
        page.keyboard.press(key)
    done(page, 1)
    expect(page.locator("#turns")).to_have_text("Prompt 1")
    page.go_back()
    expect(page.locator("#turns")).to_have_text("Prompt 0")
    expect(page.get_by_text("changing an earlier judgement")).to_be_visible()
    expect(page.locator(".card [aria-pressed=true]")).to_have_text(["1", "2", "3"])
    page.go_forward()
    expect(page.locator("#turns")).to_have_text("Prompt 1")
    page.go_back()
    expect(page.locator("#turns")).to_have_text("Prompt 0")
    page.keyboard.press("3")
    page.keyboard.press("Enter")
    expect(page.locator("#turns")).to_have_text("Prompt 1")
    (kept,) = at.database.judgements()
    assert by_answer(kept, items) == dict(zip(shown, (2, 1, 2), strict=True))  # 3, 2, 3 without gaps


def test_a_thousand_items(desk: Any) -> None:
    at = desk([item(n, answers=9) for n in range(1000)])
    page = at.sit_down()
    expect(page.locator("#standing")).to_have_text("0 done · 1000 left")
    for key in "987654321":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    done(page, 1)
    page.get_by_role("link", name="History").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    kept = at.database.judgements()[0]
    assert [kept.ranks[index] for index in kept.shown] == [9, 8, 7, 6, 5, 4, 3, 2, 1]


def test_what_models_write_is_text(desk: Any) -> None:
    bad = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">{{ 7 * 7 }}"
    items = [Item(f'p"><b>{n}', f"{bad}\n\nHuman: {bad}\n\nAssistant:", (bad, f"</p>{bad}")) for n in range(2)]
    at = desk(items)
    page = at.sit_down()
    assert set(answers(page)) == set(items[0].answers)
    assert page.locator("#turns .text").all_inner_texts() == [bad, bad]
    assert page.locator("#app img, #app script").count() == 0 and page.title() == "Rank answers · a run"
    page.keyboard.press("v")
    assert page.locator("#turns .text").all_inner_texts() == [items[0].prompt]
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    done(page, 1)
    page.get_by_role("link", name="History").click()
    page.get_by_role("link", name="<script>").click()  # ids stay whole in addresses, too
    expect(page.locator(".card [aria-pressed=true]")).to_have_text(["1", "2"])
    assert page.title() == "Rank answers · a run"


def test_pairs_sort_all_answers(desk: Any) -> None:
    """Four answers in pairs: 0 and 1 are equally bad, 2 is the best, 3 is between."""
    items = [item(0, answers=4), item(1, answers=2)]
    at = desk(items, mode="pairs")
    page = at.sit_down()
    worth = {"Answer 0.0": 0, "Answer 0.1": 0, "Answer 0.2": 2, "Answer 0.3": 1}
    asked, said = 0, []
    while page.locator("#turns").inner_text() == "Prompt 0":
        a, b = answers(page)
        key = "a" if worth[a] > worth[b] else "b" if worth[a] < worth[b] else "x"
        page.keyboard.press(key)
        if asked == 0:  # one step back, and the same again
            page.keyboard.press("u")
            assert answers(page) == [a, b]
            page.keyboard.press(key)
        asked += 1
        one, other = (b, a) if key == "b" else (a, b)
        said.append(f"{one[-1]}{'=' if key == 'x' else '>'}{other[-1]}")
        page.wait_for_function(CHANGED, arg=",".join((a, b)))
    done(page, 1)
    kept = at.database.judgements()[0]
    assert by_answer(kept, items) == {"Answer 0.0": 3, "Answer 0.1": 3, "Answer 0.2": 1, "Answer 0.3": 2}
    assert kept.flags == ("bad:0", "bad:1") and asked <= 5
    assert kept.compared == tuple(said), "each verdict once, also that which was taken back and given again"
    # What was refused can be sent again, also after a reload.
    at.expected.append("status of 403")
    page.route("**/api/judgement", lambda route: route.fulfill(status=403, json={"error": "too old"}))
    page.get_by_role("button", name="Equal").click()
    expect(page.locator("#banner")).to_contain_text("Not saved: too old")
    page.unroute("**/api/judgement")
    page.reload()
    expect(page.locator("#choices")).to_be_hidden()
    page.keyboard.press("a")  # the choice is made
    expect(page.locator(".card:visible")).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.locator("#nothing")).to_be_visible()
    assert by_answer(at.database.judgements()[1], items) == {"Answer 1.0": 1, "Answer 1.1": 1}


def test_a_phone_and_ratings(desk: Any) -> None:
    long = Item("p0", "word" * 200, ("a" * 300, "b " * 300, *(f"answer {n}" for n in range(7))))
    at = desk([long], ratings=True)
    page = at.sit_down(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
    for index in range(9):
        card = page.locator(".card").nth(index)
        card.get_by_role("button", name=f"Rank {9 - index}").tap()
        if index < 2:
            card.get_by_role("button", name=f"Rating {index + 6}").tap()
    page.get_by_role("button", name="Submit").tap()
    expect(page.locator("#nothing")).to_be_visible()
    (kept,) = at.database.judgements()
    assert [kept.ranks[index] for index in kept.shown] == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [kept.ratings[index] for index in kept.shown] == [6, 7, *[None] * 7]


def test_every_control_has_a_name_for_a_screen_reader(desk: Any) -> None:
    at = desk([item()], ratings=True)
    page = at.sit_down()
    tree = page.locator("body").aria_snapshot()
    for words in (
        'navigation "Pages"', 'heading "Prompt" [level=1]', 'region "Answers"', 'article "Answer A, not ranked"',
        'group "Rank of answer A"', 'button "Rank 1"', 'group "Rating of answer C"', 'button "Submit Enter"',
        'progressbar "Progress"',
    ):  # fmt: skip
        assert words in tree, (words, tree)
    assert not [line for line in tree.splitlines() if line.strip() in ("- button", "- link", "- textbox", "- checkbox")]
    page.keyboard.press("1")
    expect(page.get_by_label("Answer A, rank 1 of 3")).to_be_visible()
    expect(page.get_by_role("button", name="Rank 1", pressed=True)).to_have_count(1)
