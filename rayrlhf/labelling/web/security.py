"""Who may use the page, and what a browser may do with it.

A labeller has a link with a token. The token follows from a secret beside the database and the labeller's name, so
links stay good over restarts and no token is stored. A new secret makes all links void.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrlhf.errors import UserError
from rayrlhf.files import make_private, replacing

LARGEST_BODY = 64 * 1024
"""Bytes of a request: nine ranks and a note are far below."""
BUCKETS = 10_000
"""Kept at least: of so many keys, such as addresses of strangers, it is known how much they have asked."""
SLOWEST_BODY_S = 30.0
"""How long a request may take to arrive: anybody who reaches the page could hold connections open."""

HEADERS = {
    # Nothing is fetched from anywhere else, nothing inline runs, and no other page may frame this one.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # a link holds a token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Tokens:
    """Tokens of labellers, and of their forms against cross-site requests (CSRF)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.cookie = f"rayrlhf_label_{self._sign('cookie')[:8]}"
        """The cookie's name. Ports share cookies, so each run has one of its own."""

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Those of the secret in a file; it is made where there is none.

        Raises:
            UserError: the file cannot be read, or holds no secret.
        """
        try:
            if not path.exists():
                with replacing(path) as temporary:
                    make_private(temporary)
                    temporary.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
            secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read as the secret of the links ({error}); delete it for new links"
            ) from None
        if len(secret) < 32:
            raise UserError(f"{path}: too short for the secret of the links; delete it for new links")
        return cls(secret)

    def of(self, name: str) -> str:
        """The token of a labeller's link and cookie: ASCII, as a header holds no other letters."""
        return f"{quote(name)}~{self._sign('labeller', name)}"

    def name(self, token: str) -> str | None:
        """Whose token it is; None if nobody's."""
        given, _, signature = token.rpartition("~")
        name = unquote(given)  # a path comes without its quotes already
        fits = hmac.compare_digest(signature.encode(), self._sign("labeller", name).encode())
        return name if name and fits else None

    def csrf(self, name: str, labels: str) -> str:
        """What a page of this labeller sends with every change. Another site cannot read it.

        Args:
            name: of the labeller.
            labels: the identity of the database: a page that shows the answers of another one must change nothing.
        """
        return self._sign("csrf", name, labels)

    def csrf_fits(self, name: str, labels: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.csrf(name, labels).encode())

    def _sign(self, *parts: str) -> str:
        return hmac.new(self._secret, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:40]


@dataclass
class RateLimit:
    """A bucket for each key: it holds `burst` requests and gets `rate` back each second."""

    rate: float
    burst: float
    clock: Callable[[], float] = field(default=time.monotonic)
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def allows(self, key: str) -> bool:
        """Take one request out of the bucket, if it holds one. Threads may share it."""
        with self._turn:
            now = self.clock()
            if len(self._left) > BUCKETS:  # only full buckets go: they say what an unknown key says
                self._left = {k: v for k, v in self._left.items() if self._filled(*v, now) < self.burst}
            left = self._filled(*self._left.get(key, (self.burst, now)), now)
            self._left[key] = (left - 1 if left >= 1 else left, now)
            return left >= 1

    def _filled(self, left: float, since: float, now: float) -> float:
        return min(self.burst, left + (now - since) * self.rate)


class Guard:
    """Around the application: headers on every response, and no request that is too large or too slow."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if not scope["path"].startswith("/static/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        # The whole body is read here, so that a length that the request only claims does not count.
        body, more = b"", scope["method"] not in ("GET", "HEAD")
        try:
            async with asyncio.timeout(SLOWEST_BODY_S):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False) and len(body) <= LARGEST_BODY
        except TimeoutError:
            await _refusal(408, f"a request may take {SLOWEST_BODY_S:g} s to arrive")(scope, receive, send_guarded)
            return
        if len(body) > LARGEST_BODY:
            await _refusal(413, f"a request may have {LARGEST_BODY} bytes")(scope, receive, send_guarded)
            return
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if scope["method"] in ("GET", "HEAD") or given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send_guarded)


def _refusal(status: int, words: str) -> JSONResponse:
    # What has not been read would be taken for the next request.
    return JSONResponse({"error": words}, status, {"Connection": "close"})
