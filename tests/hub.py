"""A hub on loopback with what uploading a folder needs: repositories, LFS objects, commits that can be read back."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What it was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        """LFS objects by their SHA-256."""
        self.files: dict[str, dict[str, bytes]] = {}
        """Of each repository, by path."""
        self.tokens: set[str | None] = set()
        self.refuses = 0
        """A status with which it answers all; 0 for none."""


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that listens during the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        found = self.server.hub  # type: ignore[attr-defined]
        assert isinstance(found, Hub)
        return found

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: Any, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        _, _, _, *name = self.path.partition("?")[0].split("/")
        repository = "/".join(name[:2])
        known = repository in self.hub.repositories
        siblings = [{"rfilename": path} for path in self.hub.files.get(repository, {})]
        self._send({"id": repository, "sha": "0" * 40, "siblings": siblings} if known else {}, 200 if known else 404)

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._send({})

    def do_POST(self) -> None:
        path, content = self.path.partition("?")[0], self._body()
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.refuses:
            self._send({"error": "no"}, self.hub.refuses)
        elif path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.repositories[name] = asked
            self.hub.files.setdefault(name, {})
            self._send({"url": f"{self.hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(content)["files"]
            self._send(
                {
                    "files": [
                        {"path": f["path"], "shouldIgnore": False, "oid": None,
                         "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                        for f in files
                    ]
                }
            )  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(content)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), content)
        else:
            self._send({}, 404)

    def _commit(self, repository: str, content: bytes) -> None:
        files = self.hub.files[repository]
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.url}/{repository}/commit/{'1' * 40}"
        self._send({"commitUrl": url, "commitOid": "1" * 40, "hookOutput": "", "success": True})
