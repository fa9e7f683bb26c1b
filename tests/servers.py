"""HTTP servers on loopback that answer as a test wants them to, or as a judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[Any], tuple[int, str]]
"""Status and text of the answer to a JSON body."""


class Server(ThreadingHTTPServer):
    """Answers each request by `answer`, and remembers what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked, self.headers_seen = answer, [], []  # type: ignore[var-annotated]
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, body))
            server.headers_seen.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            status, text = server.answer(body)
        finally:
            with server.lock:
                server.at_once -= 1
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def says(choose: Callable[[str], str]) -> Answer:
    """A chat completion by what it is asked."""

    def answer(body: Any) -> tuple[int, str]:
        message = {"role": "assistant", "content": choose(body["messages"][0]["content"])}
        return 200, json.dumps({"choices": [{"message": message}], "usage": {"total_tokens": 7}})

    return answer
