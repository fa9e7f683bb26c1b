"""Take the pictures of the ranking page for docs/labelling.md, with Chromium, of answers that were written for it.

    python scripts/label_figures.py docs/figures/labelling

Two people rank with a seeded error, so that the admin's page has figures. Look at the pictures before you commit them.
"""

from __future__ import annotations

import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from jobs.label import INSTRUCTIONS
from rayrlhf.labelling.assignment import Assigner, shown_order
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement, dense
from rayrlhf.labelling.web.app import Site, application
from rayrlhf.labelling.web.security import Tokens

POST = """SUBREDDIT: r/relationships
TITLE: My [22F] roommate [23F] keeps eating my food
POST: We moved in together in August. Since then she eats whatever is in the fridge without asking. Last week I had \
bought everything for a birthday cake, and on the morning of the party the butter and the eggs were gone.

I have talked to her twice. Each time she was sorry and brought me a coffee, and a week later it began again. I do not \
want to lose her as a friend, but I cannot pay for two. A lock on the fridge feels childish.
TL;DR:"""
SUMMARIES = (
    "Roommate keeps eating my food. Two talks did not help, and the last time she ate what was for a birthday cake. "
    "How do I make her stop without losing a friend?",
    "I bought everything for a birthday cake and the butter and the eggs were gone.",
    "My roommate is a thief who never apologised, so I will move out tomorrow.",
    "We moved in together in August. She eats my food without asking. I talked to her twice. I do not want to lose her "
    "as a friend, but I cannot pay for two, and a lock on the fridge feels childish.",
)
CHAT = (
    "\n\nHuman: My cat stopped eating two days ago. What should I do?"
    "\n\nAssistant: I am sorry to hear that. Does it still drink, and does it seem to be in pain?"
    "\n\nHuman: It drinks a little. It hides under the bed all day.\n\nAssistant:"
)
ADVICE = (
    "A cat that has not eaten for two days should be seen by a vet today. Hiding is a sign of pain. Until then offer "
    "water and a little warm food, and give it no medicine that was made for people.",
    "It is probably just tired. Wait another week.",
    "Take it to a vet: two days without food can already harm its liver.",
)


def main(directory: Path) -> None:
    """Write the pictures into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or sys.exit("label_figures: install Chromium (apt install chromium)")
    with tempfile.TemporaryDirectory() as temporary, socket.create_server(("127.0.0.1", 0)) as listening:
        database = LabelDatabase(Path(temporary) / "labels.sqlite")
        database.add_items([Item("p00", POST, SUMMARIES, priority=2), Item("p01", CHAT, ADVICE, priority=1)])
        database.add_items(
            [Item(f"p{n:02d}", POST, SUMMARIES, gold=(1, 3, 4, 2) if n % 8 == 0 else None) for n in range(2, 60)]
        )
        for name, role in (("ann", "labeller"), ("bob", "labeller"), ("admin", "admin")):
            database.add_labeller(name, role)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        site = Site(
            database,
            Tokens.read(Path(temporary) / "secret"),
            Assigner(database, overlap=2, repeats=0, gold=0),
            "quickstart",
            INSTRUCTIONS,
            url,
        )
        for name, error in (("ann", 0.5), ("bob", 0.9)):
            for n in range(2, 42):
                judge(database, f"p{n:02d}", name, error, 0)
            for n in range(2, 8):
                judge(database, f"p{n:02d}", name, error, 1)
        database.judge(Judgement("p42", "bob", None, skipped="Too long", seconds=12, at=time.time()), "skipped")
        server = uvicorn.Server(uvicorn.Config(application(site), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

            def sit_down(name: str, width: int, height: int, scheme: str = "light", scale: float = 1.0) -> Page:
                context = browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme="dark" if scheme == "dark" else "light",
                    device_scale_factor=scale,
                    reduced_motion="reduce",  # else a picture may show a colour on its way
                )
                page = context.new_page()
                page.goto(site.link(name))
                page.get_by_role("link", name="Begin").click()
                expect(page.locator(".card").first).to_be_visible()
                return page

            page = sit_down("ann", 1280, 1010)
            for key in ("2", "1", "2"):
                page.keyboard.press(key)
            page.screenshot(path=directory / "rank.png")
            for key in ("4", "Enter"):
                page.keyboard.press(key)
            expect(page.locator(".turn.assistant")).to_be_visible()
            page.emulate_media(color_scheme="dark")
            for key in ("1", "f", "1", "Enter"):
                page.keyboard.press(key)
            page.screenshot(path=directory / "dark.png")
            page = sit_down("bob", 390, 844, "dark", 1.5)
            for key in ("1", "2"):
                page.keyboard.press(key)
            page.screenshot(path=directory / "phone.png")
            page = sit_down("admin", 1280, 800)
            page.get_by_role("link", name="Admin").click()
            page.screenshot(path=directory / "admin.png", full_page=True)
            browser.close()
        server.should_exit = True
        thread.join()
        database.close()


def judge(database: LabelDatabase, item: str, name: str, error: float, repeat: int) -> None:
    """A ranking that is right but for a normal error in the worth of each answer."""
    chance = random.Random(f"{item} {name} {repeat}")
    ranks = dense([round(worth + chance.gauss(0, error)) for worth in (1, 3, 4, 2)])
    shown = shown_order("", name, item, repeat, 4)
    seconds = chance.uniform(20, 50)
    judgement = Judgement(item, name, ranks, shown=shown, seconds=seconds, at=time.time(), repeat=repeat)
    database.judge(judgement, f"{item} {name} {repeat}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
