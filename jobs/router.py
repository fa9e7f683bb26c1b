"""One OpenAI-compatible address for several servers of one model each: it asks for the token and hands requests on.

Everything about the requests themselves is vLLM's: completions and chat completions, streams, log-probs, errors.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rayrlhf.errors import UserError
from rayrlhf.wording import shown

TOKEN = "RAYRLHF_TOKEN"
"""Environment variable with the token that requests have to bring."""
_SHORTEST_TOKEN = 16
LONGEST_BODY = 32 * 2**20
"""Bytes of a request; of a longer one no more is read before it is refused."""
_HOP = {"content-length", "transfer-encoding", "connection", "date", "server"}
"""Headers of an answer that this server writes itself."""


class Bearer:
    """Lets only those in who have the token; `/health` is open."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        open_to_all = scope["type"] == "lifespan" or scope.get("path") == "/health"
        if open_to_all or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        else:
            refused = problem(401, "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`")
            await refused(scope, receive, send)


def problem(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = {401: "authentication_error", 503: "server_error"}.get(status, "invalid_request_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def router(sockets: Mapping[str, Path], token: str, timeout_s: float = 600.0) -> Starlette:
    """The application.

    Args:
        sockets: the Unix socket of each model's server, by the model's name.
        token: that every request has to bring.
        timeout_s: for which a server may say nothing.
    """
    clients: dict[str, httpx.AsyncClient] = {}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for name, path in sockets.items():
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            clients[name] = httpx.AsyncClient(
                transport=transport, base_url="http://model", timeout=httpx.Timeout(timeout_s, connect=10.0)
            )
        yield
        for client in clients.values():
            await client.aclose()

    async def health(request: Request) -> Response:
        return Response(status_code=200)

    async def models(request: Request) -> Response:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "rayrlhf"} for name in sockets]
        return JSONResponse({"object": "list", "data": listed})

    async def forward(request: Request) -> Response:
        read = bytearray()
        async for piece in request.stream():  # whose length a client need not say, or may say wrongly
            read += piece
            if len(read) > LONGEST_BODY:
                return problem(413, f"a request has at most {LONGEST_BODY} bytes")
        body = bytes(read)
        try:
            name = json.loads(body)["model"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return problem(400, "the request is no JSON object with the key `model`")
        if not isinstance(name, str) or name not in clients:
            return problem(404, f"no model {shown(name)} here; there are: {', '.join(sockets)}")
        client = clients[name]
        outgoing = client.build_request(
            "POST", request.url.path, content=body, headers={"content-type": "application/json"}
        )
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.TransportError as error:
            return problem(503, f"the server of {name} does not answer ({type(error).__name__})")
        headers = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, headers, background=BackgroundTask(answer.aclose)
        )

    routes = [Route("/health", health), Route("/v1/models", models)]
    routes += [Route(f"/v1/{path}", forward, methods=["POST"]) for path in ("completions", "chat/completions")]
    return Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(Bearer, token=token)])


def read_token(file: Path | None) -> tuple[str, str]:
    """The token, and where it comes from: the file, the variable `RAYRLHF_TOKEN`, or chance.

    Raises:
        UserError: the file cannot be read, or the token is short or has white space in it.
    """
    if file is not None:
        try:
            token, origin = file.read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"serve: --token-file {file} cannot be read ({error})") from None
    elif given := os.environ.get(TOKEN):
        token, origin = given.strip(), TOKEN
    else:
        return secrets.token_urlsafe(24), ""
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"serve: the token of {origin} must be {_SHORTEST_TOKEN} or more ASCII letters without space")
    return token, origin
