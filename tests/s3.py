"""An S3 server on loopback: moto's, with one empty bucket."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@dataclass(frozen=True)
class S3:
    endpoint: str

    def uri(self, path: str) -> str:
        """The URI that rayrlhf is given."""
        return f"s3://{BUCKET}/{path}?endpoint_override={self.endpoint}"

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What the bucket holds below a prefix, asked with Amazon's own client: name behind the prefix to content."""
        client = _client(self.endpoint)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {
            key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in keys
            if not key.endswith("/")  # pyarrow marks directories so
        }


@contextlib.contextmanager
def serving() -> Iterator[S3]:
    """The server, as long as the block lasts.

    In a process of its own: vLLM, when it starts, touches every attribute of every module that is loaded, and those of
    the server's web framework raise.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto's server does not start"
                time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{port}"
        _client(endpoint).create_bucket(Bucket=BUCKET)
        yield S3(endpoint)
    finally:
        server.kill()
        server.wait()


def _client(endpoint: str) -> Any:
    keys = {name.lower(): value for name, value in KEYS.items()}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
