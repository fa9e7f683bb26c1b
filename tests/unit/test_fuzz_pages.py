"""HTTP requests of any content to the three servers of the project: an answer below 500, and no exception."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st
from starlette.testclient import TestClient

from jobs.report import application as report_application
from jobs.router import router
from rayrlhf.config_file import parse_config
from rayrlhf.labelling.assignment import Assigner
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item
from rayrlhf.labelling.web.app import Site, application
from rayrlhf.labelling.web.security import Tokens
from rayrlhf.runs.folder import open_or_create
from rayrlhf.runs.metrics import MetricsWriter
from tests.fuzz import CASES, changed_json, damaged, try_cases

URL, TOKEN = "http://127.0.0.1:8100", "a-token-of-the-test"
SENT = {
    "key": "0123456789abcdef", "item": "p0", "repeat": 0, "ranks": [1, 2, 3], "seconds": 4.0, "note": "why",
    "flags": [["harmful", 1]], "ratings": [1, 7, None], "compared": [[0, ">", 1]],
}  # fmt: skip
ASKED = {"model": "policy", "prompt": "Why?", "max_tokens": 3}
ODD_BODIES = (b"", b"[" * 5000, b"\xff\xfe", b'{"model": ["x"]}', b'{"model": "\\ud83d"}', b'"model"', b"9" * 5000)
HEADERS = ("Host", "Cookie", "Content-Type", "Content-Length", "X-CSRF-Token", "Authorization", "Origin", "Range")


@st.composite
def requests(draw: Any, paths: tuple[str, ...], sent: dict[str, Any]) -> tuple[str, str, bytes, dict[str, str], bool]:
    """Method, path with query, body, more headers, and whether the sender is known."""
    odd = st.tuples(st.sampled_from(["/", "/enter/", "/export/"]), st.binary(max_size=8).map(quote)).map("".join)
    path = draw(st.sampled_from(paths) | odd)
    query = draw(st.sampled_from(["", "?item=p0&repeat=1", "?item=p9", "?item=&item=p0", "?repeat=x", "?%ff=%00"]))
    body = json.dumps(sent).encode()
    match draw(st.sampled_from(["whole", "changed", "changed", "damaged", "odd"])):
        case "changed":
            body = changed_json(body, draw)
        case "damaged":
            body = damaged(body, draw)
        case "odd":
            body = draw(st.sampled_from(ODD_BODIES))
    value = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12) | st.sampled_from(
        ["~", "a~b", "-1"]
    )
    more = draw(st.dictionaries(st.sampled_from(HEADERS), value, max_size=2))
    method = draw(st.sampled_from(["GET", "POST", "POST", "PUT", "HEAD", "DELETE", "OPTIONS"]))
    return method, path + query, body, more, draw(st.integers(0, 4)) > 0


def asked(client: TestClient, case: tuple[str, str, bytes, dict[str, str], bool], known: dict[str, str]) -> int:
    """The status of the answer; an exception of the application passes through."""
    method, path, body, more, is_known = case
    headers = (known if is_known else {}) | more
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    content = None if method in ("GET", "HEAD") else body
    return client.request(method, URL + path, content=content, headers=encoded).status_code


@CASES
def test_the_ranking_page_answers_any_request(tmp_path: Path, cases: int) -> None:
    seconds = itertools.count()
    database = LabelDatabase(tmp_path / "labels.sqlite")
    database.add_items([Item(f"p{i}", f"prompt {i}", ("first", "second", "third")) for i in range(3)])
    for name, role in (("ann", "labeller"), ("admin", "admin")):
        database.add_labeller(name, role)
    tokens = Tokens.read(tmp_path / "secret")
    site = Site(database, tokens, Assigner(database), "run", "Rank", URL, clock=lambda: float(next(seconds)))
    known = {
        "Cookie": f"{tokens.cookie}={tokens.of('admin')}",
        "X-CSRF-Token": tokens.csrf("admin", database.identity),
    }
    paths = (
        "/", "/enter/x", f"/enter/{tokens.of('ann')}", "/history", "/admin", "/export/pairs.jsonl", "/export/x",
        "/api/item", "/api/judgement", "/api/judgement", "/api/judgement", "/api/undo", "/static/label.js", "/static/",
    )  # fmt: skip
    with TestClient(application(site), base_url=URL) as client:
        try_cases(cases, lambda case: _below_500(asked(client, case, known)), requests(paths, SENT))
        assert asked(client, ("POST", "/api/judgement", json.dumps(SENT).encode(), {}, True), known) == 200
    assert database.written() > 0


@CASES
def test_the_router_answers_any_request(tmp_path: Path, cases: int) -> None:
    """The server of its model does not run, which is 503."""
    app = router({"policy": tmp_path / "none.sock"}, TOKEN, timeout_s=1.0)
    paths = ("/health", "/v1/models", "/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/x")
    known = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(app, base_url=URL) as client:
        strategy = requests(paths, ASKED)
        try_cases(cases, lambda case: _below_500(asked(client, case, known), 503), strategy)
        assert asked(client, ("POST", "/v1/completions", json.dumps(ASKED).encode(), {}, True), known) == 503


@CASES
def test_the_report_answers_any_request(tmp_path: Path, cases: int) -> None:
    run = open_or_create(parse_config({"name": "one"}, "test"), tmp_path)
    with MetricsWriter(run.path) as writer:
        writer.write("rl", 1, {"rl/kl": 1.0})
    with TestClient(report_application(run), base_url=URL) as client:
        strategy = requests(("/", "/state", "/x"), {})
        try_cases(cases, lambda case: _below_500(asked(client, case, {})), strategy)
        assert asked(client, ("GET", "/", b"", {}, True), {}) == 200


def _below_500(status: int, *besides: int) -> None:
    assert status < 500 or status in besides
