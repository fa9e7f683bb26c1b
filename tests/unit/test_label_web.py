"""The ranking page's server: who gets in, what a request may do, and that a judgement arrives as it was meant."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rayrlhf.errors import UserError
from rayrlhf.labelling.assignment import Assigner, shown_order
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.exports import check_name
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.labelling.web.admin import first_places
from rayrlhf.labelling.web.app import Site, application
from rayrlhf.labelling.web.messages import unshown
from rayrlhf.labelling.web.security import LARGEST_BODY, RateLimit, Tokens

ITEMS = [Item(f"p{i}", f"prompt {i}", ("first", "second", "third")) for i in range(3)]
URL = "http://127.0.0.1:8100"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    database = LabelDatabase(tmp_path / "labels.sqlite")
    database.add_items(ITEMS)
    for name, role in (("ann", "labeller"), ("bob", "labeller"), ("admin", "admin")):
        database.add_labeller(name, role)
    return Site(
        database=database,
        tokens=Tokens.read(tmp_path / "secret"),
        assigner=Assigner(database, repeats=0.0),
        title="run & co",
        instructions="# Rank\n\n<b>not bold</b> ![x](http://elsewhere/x.png) [bad](javascript:alert(1))",
        url=URL,
    )


def enter(site: Site, name: str) -> TestClient:
    """A browser that has opened somebody's link, and sends what the page's script sends."""
    client = TestClient(application(site), base_url=URL)
    assert client.get(f"/enter/{site.tokens.of(name)}").status_code == 200
    client.headers["X-CSRF-Token"] = site.tokens.csrf(name, site.database.identity)
    return client


def sent(item: str = "p0", **changes: Any) -> dict[str, Any]:
    return {"key": "0123456789abcdef", "item": item, "repeat": 0, "ranks": [1, 2, 3], "seconds": 4.0, **changes}


# ---- judgements


def test_a_judgement_arrives_in_the_order_of_the_answers(site: Site) -> None:
    client = enter(site, "ann")
    item = client.get("/api/item").json()["item"]
    wanted = {"first": 2, "second": 1, "third": 2}
    ratings = {"first": None, "second": 7, "third": 3}
    place = item["answers"].index("third")
    body = sent(
        item["id"],
        ranks=[wanted[answer] for answer in item["answers"]],
        ratings=[ratings[answer] for answer in item["answers"]],
        flags=[["harmful", place], ["off_topic", "prompt"]],
        note=" because ",
    )
    assert client.post("/api/judgement", json=body).json() == {"saved": True}
    (kept,) = site.database.judgements()
    assert (kept.item, kept.labeller, kept.ranks, kept.ratings) == (item["id"], "ann", (2, 1, 2), (None, 7, 3))
    assert (kept.flags, kept.note, kept.seconds) == (("harmful:2", "off_topic:prompt"), "because", 4.0)
    assert kept.shown == shown_order("", "ann", item["id"], 0, 3)
    assert [ITEMS[0].answers[index] for index in kept.shown] == item["answers"]
    # Looked at again, it is as it was sent.
    again = client.get(f"/api/item?item={item['id']}&repeat=0").json()["item"]
    assert again["mine"] == {
        "ranks": body["ranks"], "ratings": body["ratings"], "note": "because", "skipped": "",
        "flags": [["harmful", place], ["off_topic", "prompt"]],
    }  # fmt: skip


def test_ranks_have_no_gaps_and_places_are_brought_back(site: Site) -> None:
    assert unshown("xyz", (2, 0, 1)) == ["y", "z", "x"]
    client = enter(site, "ann")
    client.post("/api/judgement", json=sent(ranks=[3, 3, 1]))
    kept = site.database.judgements()[0]
    assert kept.ranks is not None and [kept.ranks[index] for index in kept.shown] == [2, 2, 1]


def test_what_the_browser_sends_again_is_kept_once(site: Site) -> None:
    client = enter(site, "ann")
    for _ in range(3):
        assert client.post("/api/judgement", json=sent()).status_code == 200
    assert site.database.written() == 1
    enter(site, "bob").post("/api/judgement", json=sent())  # the same key of somebody else is another judgement
    assert site.database.written() == 2


def test_undo_shows_the_item_as_it_was(site: Site) -> None:
    client = enter(site, "ann")
    assert client.post("/api/undo", json={}).json() == {"error": "there is nothing to undo"}
    first = client.get("/api/item").json()
    assert first["standing"] == {"done": 0, "left": 3, "pace": None} and first["item"]["mine"] is None
    client.post("/api/judgement", json=sent(first["item"]["id"], ranks=None, skipped="Too long"))
    second = client.get("/api/item").json()
    assert second["item"]["id"] != first["item"]["id"] and second["standing"] == {"done": 1, "left": 2, "pace": 4.0}
    undone = client.post("/api/undo", json={}).json()
    assert undone["item"] == {
        **first["item"],
        "mine": {"ranks": None, "ratings": None, "note": "", "skipped": "Too long", "flags": []},
    }
    assert client.get("/api/item").json()["item"]["id"] == first["item"]["id"]
    assert undone["standing"]["done"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"item": "p9"}, "no such item"),
        ({"ranks": [1, 2]}, "ranks must have 3 values"),
        ({"ratings": [1, 2]}, "ratings must have 3 values"),
        ({"ranks": [1, 2, 0]}, "ranks.2: Input should be greater than or equal to 1"),
        ({"ranks": None}, "a judgement has ranks, or a reason"),
        ({"skipped": "Too long"}, "a judgement has ranks, or a reason"),
        ({"flags": [["harmful", 3]]}, "a flag does not fit"),
        ({"flags": [["<b>", 0]]}, "a flag does not fit"),
        ({"ratings": [8, 1, 1]}, "ratings.0: Input should be less than or equal to 7"),
        ({"compared": [[0, ">", 3]]}, "two answers that were compared do not fit"),
        ({"compared": [[1, "=", 1]]}, "two answers that were compared do not fit"),
        ({"compared": [[0, "!", 1]]}, "compared.0.1: Input should be"),
        ({"seconds": -1}, "seconds: Input should be greater"),
        ({"note": "x" * 5001}, "note: String should have at most 5000"),
        ({"labeller": "bob"}, "labeller: Extra inputs are not permitted"),
        ({"key": "short"}, "key: String should have at least 16"),
    ],
)  # fmt: skip
def test_a_judgement_that_does_not_fit_is_refused_in_words(site: Site, changes: dict[str, Any], words: str) -> None:
    answer = enter(site, "ann").post("/api/judgement", json=sent(**changes))
    assert answer.status_code == 422 and words in answer.json()["error"], answer.json()
    assert site.database.written() == 0


def test_a_full_disk_is_said_on_the_page_and_in_the_terminal(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    client = enter(site, "ann")
    pages = site.database.query("PRAGMA page_count")[0][0]
    site.database.query(f"PRAGMA max_page_count={pages}")
    long = sent(note="x" * 5000, skipped="y" * 200, ranks=None)
    answers = [client.post("/api/judgement", json={**long, "key": f"{number:016}"}) for number in range(5)]
    # The file may have room for the first of them.
    assert answers[-1].status_code == 503 and "cannot be stored now" in answers[-1].json()["error"]
    assert "disk is full" in capsys.readouterr().out
    kept = [answer.status_code for answer in answers].count(200)
    site.database.query("PRAGMA max_page_count=100000")
    assert client.post("/api/judgement", json={**long, "key": f"{4:016}"}).json() == {"saved": True}
    assert site.database.written() == kept + 1


# ---- who gets in


def test_nobody_gets_in_without_a_link(site: Site) -> None:
    client = TestClient(application(site), base_url=URL)
    good = site.tokens.of("ann")
    for path in ("/", "/history", "/admin", "/api/item", "/export/rankings.jsonl", "/enter/ann", f"/enter/{good[:-1]}x",
                 f"/enter/{good.replace('ann', 'bob')}", f"/enter/{site.tokens.of('stranger')}"):  # fmt: skip
        assert client.get(path).status_code == 401, path
    assert client.post("/api/judgement", json=sent()).status_code == 401
    other = Tokens(b"another secret that is long enough!")
    assert client.get(f"/enter/{other.of('ann')}").status_code == 401 and other.cookie != site.tokens.cookie


def test_only_the_admin_sees_what_others_said(site: Site) -> None:
    client = enter(site, "ann")
    assert client.get("/admin").status_code == client.get("/export/rankings.jsonl").status_code == 403
    assert site.tokens.of("bob") not in client.get("/").text + client.get("/history").text
    client.post("/api/judgement", json=sent())
    admin = enter(site, "admin")
    page = admin.get("/admin").text
    assert site.link("bob") in page and "72.6 ± 1.5 %" in page
    assert [json.loads(line)["id"] for line in admin.get("/export/rankings.jsonl").text.splitlines()] == ["p0"]
    assert len(admin.get("/export/pairs.jsonl").text.splitlines()) == 3
    assert admin.get("/export/secret").status_code == 404


def test_the_forgotten_do_not_get_in(site: Site) -> None:
    client = enter(site, "ann")
    site.database.forget("ann")
    assert client.get("/").status_code == client.post("/api/judgement", json=sent()).status_code == 401


def test_links_stay_good_over_restarts_and_no_token_is_stored(site: Site, tmp_path: Path) -> None:
    assert Tokens.read(tmp_path / "secret").of("ann") == site.tokens.of("ann")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600 == site.database.path.stat().st_mode & 0o777
    signature = site.tokens.of("ann").partition("~")[2].encode()
    assert not any(signature in path.read_bytes() for path in tmp_path.iterdir())
    for content, words in (("", "too short"), ("no hex", "cannot be read")):
        (tmp_path / "secret").write_text(content)
        with pytest.raises(UserError, match=words):
            Tokens.read(tmp_path / "secret")


@pytest.mark.parametrize("name", ["Zoë", "Анна", "花子"])
def test_a_name_may_have_the_letters_of_any_language(site: Site, name: str) -> None:
    site.database.add_labeller(check_name(name, "test"))
    assert site.link(name).isascii()
    client = enter(site, name)
    assert client.post("/api/judgement", json=sent()).status_code == 200 and name in client.get("/history").text
    assert [judgement.labeller for judgement in site.database.judgements()] == [name]
    typed = TestClient(application(site), base_url=URL)  # as a person or a mail program may write it
    assert typed.get(f"/enter/{name}~{site.tokens.of(name).partition('~')[2]}").status_code == 200


def test_a_kill_while_the_secret_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: int) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("rayrlhf.labelling.web.security.secrets.token_hex", killed)
        Tokens.read(tmp_path / "secret")
    assert Tokens.read(tmp_path / "secret").of("ann") == Tokens.read(tmp_path / "secret").of("ann")


def test_the_cookie_is_for_this_site_only(site: Site) -> None:
    def attributes(url: str) -> str:
        there = replace(site, url=url)
        client = TestClient(application(there), base_url=url)
        return client.get(f"/enter/{site.tokens.of('ann')}").headers["set-cookie"].lower()

    assert "httponly" in attributes(URL) and "samesite=strict" in attributes(URL) and "secure" not in attributes(URL)
    assert "secure" in attributes("https://labels.example.org")


def test_a_change_needs_the_token_of_our_own_page(site: Site) -> None:
    client = enter(site, "ann")
    page = client.get("/").text
    assert f'content="{client.headers["X-CSRF-Token"]}"' in page
    for wrong in ("", "x", site.tokens.csrf("bob", site.database.identity)):
        client.headers["X-CSRF-Token"] = wrong
        assert client.post("/api/judgement", json=sent()).status_code == 403
        assert client.post("/api/undo", json={}).status_code == 403
    assert site.database.written() == 0
    assert client.get("/api/judgement").status_code == 405


def test_a_page_of_other_answers_changes_nothing(site: Site, tmp_path: Path) -> None:
    """A run's labels were moved away and its answers sampled anew, while somebody had the page open."""
    client = enter(site, "ann")
    store = re.search('data-store="(.*?)"', client.get("/").text)
    database = LabelDatabase(tmp_path / "anew.sqlite")
    database.add_items([replace(item, answers=item.answers[::-1]) for item in ITEMS])
    database.add_labeller("ann")
    anew = enter(replace(site, database=database, assigner=Assigner(database)), "ann")
    anew.headers["X-CSRF-Token"], current = client.headers["X-CSRF-Token"], anew.headers["X-CSRF-Token"]
    refused = anew.post("/api/judgement", json=sent())
    assert refused.status_code == 403 and "load it again" in refused.json()["error"] and database.written() == 0
    anew.headers["X-CSRF-Token"] = current
    assert anew.post("/api/judgement", json=sent()).status_code == 200
    # Nor does the browser show there what it has kept of the others.
    other = re.search('data-store="(.*?)"', anew.get("/").text)
    assert store and other and store[1] != other[1]
    assert LabelDatabase(tmp_path / "anew.sqlite").identity == database.identity


def test_another_name_of_the_host_is_refused(site: Site) -> None:
    client = TestClient(application(site), base_url="http://elsewhere.example")
    assert client.get(f"/enter/{site.tokens.of('ann')}").status_code == 400


# ---- limits and headers


def test_every_answer_forbids_what_the_page_does_not_need(site: Site) -> None:
    client = enter(site, "ann")
    for path in ("/", "/nowhere", "/api/item", "/static/label.js", "/admin"):
        headers = client.get(path).headers
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
        assert {rules[name] for name in ("script-src", "style-src", "connect-src", "img-src", "form-action")} == {
            "'self'"
        }
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers.get("cache-control") == (None if path.startswith("/static") else "no-store")


def test_pages_have_nothing_inline_and_nothing_from_elsewhere(site: Site) -> None:
    pages = [enter(site, "admin").get(path).text for path in ("/", "/history", "/admin", "/nowhere")]
    pages.append(TestClient(application(site), base_url=URL).get(f"/enter/{site.tokens.of('ann')}").text)
    static = (Path(__file__).parents[2] / "rayrlhf/labelling/web/static").glob("*.*s")
    for text in [*pages, *(path.read_text(encoding="utf-8") for path in static)]:
        assert not re.search(r"""(src\s*=|url\(|<link[^>]+href=)\s*["']?(https?:)?//""", text)
        assert not re.search(r"<script(?![^>]* src=)|<style|<[^>]+ (style|on\w+)=|innerHTML|eval\(", text)


def test_instructions_are_markdown_without_markup_of_their_own(site: Site) -> None:
    page = enter(site, "ann").get("/").text
    assert "<h1>Rank</h1>" in page and "&lt;b&gt;not bold&lt;/b&gt;" in page
    assert '<img src="http' not in page and 'href="javascript' not in page and "run &amp; co" in page


def test_a_large_request_is_refused(site: Site) -> None:
    client = enter(site, "ann")
    assert client.post("/api/judgement", content=b"x" * (LARGEST_BODY + 1)).status_code == 413
    assert (
        client.post("/api/judgement", content=(b"x" * 1000 for _ in range(100))).status_code == 413
    )  # without a length
    assert client.post("/api/judgement", content=b"x" * LARGEST_BODY).status_code == 422


def test_a_request_that_never_arrives_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.labelling.web.security.SLOWEST_BODY_S", 0.01)
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]
    told: list[Any] = []

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        told.append(message)

    request = {"type": "http", "method": "POST", "path": "/api/judgement", "headers": [], "query_string": b""}
    asyncio.run(application(site)(request, receive, send))
    assert told[0]["status"] == 408 and b"may take 0.01 s to arrive" in told[1]["body"]


def test_a_bucket_of_requests() -> None:
    now = [0.0]
    limit = RateLimit(rate=2.0, burst=3.0, clock=lambda: now[0])
    assert [limit.allows("ann") for _ in range(4)] == [True, True, True, False]
    assert limit.allows("bob")
    now[0] = 0.5
    assert [limit.allows("ann") for _ in range(2)] == [True, False]
    now[0] = 100.0
    assert [limit.allows("ann") for _ in range(4)] == [True, True, True, False]


def test_threads_share_the_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As requests do: each of them is counted once, also while full buckets go."""
    monkeypatch.setattr("rayrlhf.labelling.web.security.BUCKETS", 20)
    limit = RateLimit(rate=1.0, burst=30.0, clock=lambda: 0.0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(limit.allows, map(str, range(500))))
            allowed = list(pool.map(limit.allows, ["ann"] * 500))
    finally:
        sys.setswitchinterval(before)
    assert sum(allowed) == 30


def test_guessing_links_is_slow(site: Site) -> None:
    now = [0.0]
    there = replace(site, clock=lambda: now[0])
    client = TestClient(application(there), base_url=URL)
    codes = [client.get(f"/enter/ann~{number}").status_code for number in range(25)]
    assert codes == [401] * 20 + [429] * 5
    now[0] = 4.0  # half a guess a second
    assert [client.get(f"/enter/ann~{number}").status_code for number in range(3)] == [401, 401, 429]
    assert client.get(f"/enter/{site.tokens.of('ann')}").status_code == 200  # who is known has a bucket of their own


# ---- what people see


def test_names_of_answers_and_prompts_are_escaped_in_the_history(site: Site) -> None:
    site.database.add_items([Item("<i>&", "<script>alert(1)</script>", ("a", "b"))])
    site.database.judge(Judgement("<i>&", "ann", (1, 2), shown=(1, 0)), "1")
    page = enter(site, "ann").get("/history").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>alert" not in page and "<i>&" not in page


def test_the_share_of_best_answers_by_place() -> None:
    judgements = [
        Judgement("a", "ann", (2, 1, 3), shown=(1, 0, 2)),  # the best one was shown first
        Judgement("b", "ann", (1, 1, 2), shown=(2, 0, 1)),  # a tie of the second and the third place
        Judgement("c", "ann", None, shown=(0, 1, 2)),
        Judgement("d", "ann", (1, 2, 3)),  # imported: nobody knows how it was shown
    ]
    assert first_places(judgements) == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    assert first_places([]) == []
