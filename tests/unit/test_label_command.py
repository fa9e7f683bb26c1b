"""`rayrlhf label`: from a run's folder to links that work, and to files; mistakes are one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from jobs.label import Serving, every, label, make_site, missing_people, open_labels, prepare
from jobs.listening import LOOPBACK, listen
from rayrlhf.errors import UserError
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.storage import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    rows = [
        {"id": f"p{i}", "prompt": f"prompt {i}", "answers": ["a", "b"], "prompt_ids": [1], "answer_ids": [[1], [2]]}
        for i in range(3)
    ]
    (tmp_path / "one").mkdir()
    (tmp_path / "one/to_rank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFolder(tmp_path / "one")


def test_the_page_from_its_start_to_its_end(run: RunFolder) -> None:
    """The command as a user types it: it prints links, serves them, and ends with what it has at SIGTERM."""
    command = [sys.executable, "-m", "jobs.cli", "label", str(run.path), "--port", "0", "--labellers", "ann,bob"]
    with subprocess.Popen(
        [*command, "--overlap", "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "COLUMNS": "500"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        links = dict(re.findall(r"label: (\w+): (http\S+)", "".join(lines)))
        assert set(links) == {"ann", "bob", "admin"}, lines
        with httpx.Client() as client:
            csrf = re.search(
                r'name="csrf" content="(\w+)"', client.get(links["ann"]).text + client.get(_root(links)).text
            )
            assert csrf
            item = client.get(_root(links) + "api/item").json()["item"]
            body = {"key": "0" * 24, "item": item["id"], "repeat": 0, "ranks": [1, 1], "seconds": 2.0}
            told = client.post(_root(links) + "api/judgement", json=body, headers={"X-CSRF-Token": csrf[1]})
            assert told.json() == {"saved": True}
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0 and "closed with 1 judgements" in rest, rest
    with open_labels(run) as database:
        assert [(j.item, j.labeller, j.ranks) for j in database.judgements()] == [(item["id"], "ann", (1, 1))]


def _root(links: dict[str, str]) -> str:
    return links["ann"].partition("enter/")[0]


def test_files_out_and_in_and_forgetting(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jsonl").write_text(
        '{"id": "p0", "ranking": [1, 0], "labeller": "ann"}\n{"id": "p2", "ranking": [[0, 1]]}\n'
    )
    label(str(run.path), Serving(), export=tmp_path / "out", imported=tmp_path / "mine.jsonl")
    assert (
        tmp_path / "out/rankings.jsonl"
    ).read_text() == '{"id": "p0", "ranking": [1, 0]}\n{"id": "p2", "ranking": [[0, 1]]}\n'
    said = " ".join(capsys.readouterr().out.split())
    assert "2 rankings added" in said and "1 of 3 items have no judgement, first 'p1'" in said
    label(str(run.path), Serving(), forget="ann")
    assert "1 rows of 'ann' deleted" in " ".join(capsys.readouterr().out.split())
    label(str(run.path), Serving(), export=tmp_path / "out")
    assert (tmp_path / "out/rankings.jsonl").read_text() == '{"id": "p2", "ranking": [[0, 1]]}\n'


def test_what_collect_wrote_into_the_database_stays(run: RunFolder) -> None:
    with open_labels(run) as database:
        database.add_items([Item("p1", "prompt 1", ("a", "b"), priority=3.0, gold=(2, 1))])
    with open_labels(run) as database:
        assert database.items()[1] == Item("p1", "prompt 1", ("a", "b"), 3.0, (2, 1))
    text = run.to_rank.read_text()
    run.to_rank.write_text(text.replace('"answers": ["a", "b"]', '"answers": ["a", "c"]'))
    with pytest.raises(UserError, match="'p0' has other answers than before"), open_labels(run):
        pass


def test_labels_in_a_store_are_their_owner_s_on_every_machine(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"file://{run.path}"

    def on(node: str) -> RunFolder:
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / node))
        Store.open.cache_clear()
        return RunFolder(address)

    def says(name: str) -> Judgement:
        return Judgement("p0", name, (1, 2))

    for node, name in (("here", "ann"), ("there", "bob")):
        with open_labels(on(node)) as database:
            database.add_labeller(name)
            database.judge(says(name), name)
        files = [path for path in (tmp_path / node).rglob("*") if path.name.endswith("labels.sqlite")]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600} and len(files) == 2, files
    here = on("here")
    with open_labels(here) as database:
        assert database.judgements() == [says("ann"), says("bob")]
    # Instructions that are in the store only.
    (run.path / "instructions.md").write_text("Be fair.")
    with open_labels(here) as database:
        assert make_site(here, database, Serving(), "http://localhost").instructions == "Be fair."


def test_labellers_seed_and_overlap_are_remembered(run: RunFolder) -> None:
    with open_labels(run) as database:
        assert prepare(run, database, Serving(seed=3)) == ["labeller", "admin"]
        assert prepare(run, database, Serving(labellers="ann, bob")) == ["labeller", "ann", "bob", "admin"]
        assert prepare(run, database, Serving()) == ["labeller", "ann", "bob", "admin"]
        assert database.recall("order") == "one/3"
        with pytest.raises(UserError, match=r"--seed 4, but .* began with 3"):
            prepare(run, database, Serving(seed=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "stars"}, "--mode 'stars' must be rank or pairs"),
        ({"overlap": 0}, "--overlap 0 must be 1 or more"),
        ({"port": 70000}, "--port 70000 must be from 0 to 65535"),
        ({"repeats": 0.9}, "--repeats 0.9 must be a share"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets other machines in; say with --public-url"),
        ({"public_url": "labels.example.org"}, "--public-url 'labels.example.org' must begin with http"),
        (
            {"public_url": "httpx://labels.example.org"},
            "--public-url 'httpx://labels.example.org' must begin with http",
        ),
        ({"labellers": "ann,<b>"}, "labeller '<b>': a name has"),
        ({"labellers": "admin"}, "'admin' has a link of its own"),
        ({"instructions": Path("nowhere.md")}, "the instructions nowhere.md cannot be read"),
        ({"gold": Path("nowhere.jsonl")}, "nowhere.jsonl: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_served(run: RunFolder, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        label(str(run.path), Serving(**{"port": 0, **options}))
    assert "\n" not in str(raised.value)


def test_more_answers_than_the_page_can_show_are_refused(run: RunFolder) -> None:
    with open_labels(run) as database:
        database.add_items([Item("many", "?", tuple("abcdefghij"))])
    with pytest.raises(UserError, match="item 'many' has 10 answers, and the page ranks 9 at most"):
        label(str(run.path), Serving(port=0))


def test_a_run_that_would_wait_for_ever_is_told(run: RunFolder) -> None:
    with open_labels(run) as database:
        two = ["ann", "bob", "admin"]
        assert missing_people(database, Serving(overlap=1), two) is None  # no run waits
        database.remember("overlap", 3)
        assert missing_people(database, Serving(), ["ann", "bob", "cy", "admin"]) is None
        assert missing_people(database, Serving(overlap=4), ["ann", "bob", "cy", "admin"]) is None
        few, low = missing_people(database, Serving(), two), missing_people(database, Serving(overlap=2), two)
    assert few is not None and "waits for 3 labellers of each item" in few and "there are 2 (ann, bob)" in few
    assert low is not None and "--overlap 2, but the run waits for 3" in low


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_link_of_every_loopback_address_opens(
    run: RunFolder, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The links that the command prints, in what it serves."""
    codes: list[int] = []

    def open_link(sockets: list[socket.socket]) -> None:
        link = re.search(r"label: labeller: (http\S+)", capsys.readouterr().out)
        assert link
        client = TestClient(served[0], base_url=link[1].partition("/enter/")[0])
        codes.extend([client.get(link[1]).status_code, client.get("/").status_code])

    served = list[Any]()
    monkeypatch.setattr(uvicorn, "Config", lambda application, **_: served.append(application))
    monkeypatch.setattr(uvicorn, "Server", lambda _: SimpleNamespace(run=open_link))
    monkeypatch.setattr(
        "jobs.label.listen", lambda host, port, command: listen("127.0.0.1", 0, command)
    )  # without IPv6, too
    label(str(run.path), Serving(host=host, port=0))
    assert codes == [200, 200]


def test_a_folder_without_answers_and_a_port_that_is_taken(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no answers to rank; run collect"):
        label(str(tmp_path / "nowhere"), Serving())
    assert not (tmp_path / "nowhere").exists()
    with listen("127.0.0.1", 0, "label") as taken, pytest.raises(UserError, match="give another --port"):
        listen("127.0.0.1", taken.getsockname()[1], "label")


def test_a_copy_that_fails_is_tried_again() -> None:
    calls: list[None] = []
    third = threading.Event()

    def action() -> None:
        calls.append(None)
        if len(calls) == 3:
            third.set()
        raise OSError("the store is away")

    with every(0.001, action):
        assert third.wait(60)
    before = len(calls)
    with every(0.001, action, only=False):
        pass
    assert len(calls) == before
