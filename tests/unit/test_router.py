"""The router of `rayrlhf serve` before servers of a few lines: names, token, errors, and streams as they come."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import APIStatusError, OpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jobs.router import LONGEST_BODY, read_token, router
from rayrlhf.errors import UserError

TOKEN = "a-token-of-the-test"


def chunk(text: str) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
    body = {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n".encode()


def one_model(name: str, go_on: threading.Event) -> Starlette:
    """A server that answers with its name and what it was asked; its stream waits between two pieces."""

    async def complete(request: Request) -> Response:
        asked = await request.json()
        if asked["prompt"] == "too long":
            return JSONResponse({"error": {"message": "longer than the model", "code": 400}}, 400)
        if not asked.get("stream"):
            seen = f"{name} of {asked['prompt']}; {request.headers.get('authorization', 'no token')}"
            choice = {"index": 0, "text": seen, "finish_reason": "stop", "logprobs": None}
            return JSONResponse({"id": "c", "object": "text_completion", "created": 0, "model": name,
                                 "choices": [choice]})  # fmt: skip

        async def pieces() -> Any:
            yield chunk("one")
            await asyncio.to_thread(go_on.wait, 60)
            yield chunk("two")
            yield b"data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


def serving(app: Any, sockets: list[socket.socket]) -> tuple[uvicorn.Server, threading.Thread]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    return server, thread


@pytest.fixture(scope="module")
def go_on() -> threading.Event:
    return threading.Event()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, go_on: threading.Event) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("s")
    running, paths = [], {}
    for name in ("run/sft", "run/policy"):
        paths[name] = directory / name.replace("/", "-")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(paths[name]))
        listening.listen()
        running.append(serving(one_model(name, go_on), [listening]))
    paths["run/gone"] = directory / "nobody"
    front = socket.create_server(("127.0.0.1", 0))
    running.append(serving(router(paths, TOKEN), [front]))
    yield f"http://127.0.0.1:{front.getsockname()[1]}"
    for server, thread in reversed(running):
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, http_client=httpx.Client(trust_env=False))


def test_models_are_listed_and_each_answers_under_its_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["run/sft", "run/policy", "run/gone"]
    for name in ("run/sft", "run/policy"):
        answer = client.completions.create(model=name, prompt="why")
        assert answer.choices[0].text == f"{name} of why; no token"  # which stays with the router


def test_a_stream_comes_piece_by_piece(client: OpenAI, go_on: threading.Event) -> None:
    """The second piece is sent only when the first has been read."""
    go_on.clear()
    stream = client.completions.create(model="run/sft", prompt="why", stream=True)
    assert next(stream).choices[0].text == "one"
    go_on.set()
    assert [piece.choices[0].text for piece in stream] == ["two"]


def test_nobody_gets_in_without_the_token(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False) as http:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": TOKEN}):
            for answer in (http.get("/v1/models", headers=headers), http.post("/v1/completions", headers=headers)):
                assert answer.status_code == 401 and "Bearer TOKEN" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 200


def test_what_cannot_be_handed_on_is_an_error_in_openais_form(client: OpenAI, url: str) -> None:
    for model, status, words in (
        ("policy", 404, "no model 'policy' here; there are: run/sft, run/policy, run/gone"),
        ("run/gone", 503, "the server of run/gone does not answer"),
    ):
        with pytest.raises(APIStatusError) as raised:
            client.completions.create(model=model, prompt="why")
        assert raised.value.status_code == status and words in raised.value.message
    with pytest.raises(APIStatusError, match="longer than the model") as raised:  # the server's own words
        client.completions.create(model="run/sft", prompt="too long")
    assert raised.value.status_code == 400
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as http:
        for body in (b"no json", b"[]", b'{"prompt": "why"}'):
            assert http.post("/v1/completions", content=body).status_code == 400
        assert http.post("/v1/embeddings", content=b"{}").status_code == 404
        assert http.post("/v1/completions", content=b" " * (LONGEST_BODY + 1)).status_code == 413


def test_a_token_comes_from_a_file_a_variable_or_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYRLHF_TOKEN", raising=False)
    (first, origin), (second, _) = read_token(None), read_token(None)
    assert first != second and len(first) >= 32 and origin == ""
    monkeypatch.setenv("RAYRLHF_TOKEN", "sixteen-or-more-of-them")
    assert read_token(None) == ("sixteen-or-more-of-them", "RAYRLHF_TOKEN")
    file = tmp_path / "token"
    file.write_text("another-one-that-is-long\n")
    assert read_token(file) == ("another-one-that-is-long", str(file))
    for bad in ("short", "has white space in it", "ünd-so-weiter-und-weiter"):
        file.write_text(bad)
        with pytest.raises(UserError, match="must be 16 or more ASCII"):
            read_token(file)
    with pytest.raises(UserError, match="nowhere cannot be read"):
        read_token(tmp_path / "nowhere")
