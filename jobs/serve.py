"""`rayrlhf serve RUN`: models of a run behind one OpenAI-compatible address, a server of vLLM's own for each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from rich.text import Text

from actors.rollouts.engine import environment_variables
from jobs.answers import template_of_run
from jobs.console import console
from jobs.listening import LOOPBACK, listen
from jobs.router import read_token, router
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.data.typed import chat_template_of
from rayrlhf.errors import UserError
from rayrlhf.models.loading import context_length, load_tokenizer
from rayrlhf.runs.folder import RunFolder, stored_config
from rayrlhf.runs.models import chosen, open_run
from rayrlhf.runs.storage import local_copy
from rayrlhf.terminal import say

USUAL_LENGTH = 1024
"""Tokens of prompt and answer, unless the run's are longer."""
_POLL_S, _END_S = 0.2, 15.0
_START_S = 1800.0
"""Seconds in which all servers must answer: vLLM may have to read many gigabytes first."""
_KV_CACHE_GIB = "1"
_PR_SET_PDEATHSIG = 1


def serve(
    address: str,
    names: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    max_model_len: int | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; then all servers have ended.

    Raises:
        UserError: no such run or model, a token that does not fit, or a model that vLLM cannot serve.
        ChildProcessError: a model's server ended by itself.
    """
    token, origin = read_token(token_file)
    run = open_run(address)
    models = {f"{run.name}/{name}": place for name, place in chosen(run, names).items()}
    with (
        listen(host, port, "serve") as listening,
        tempfile.TemporaryDirectory(prefix="rayrlhf-serve-") as directory,
        started(run, models, Path(directory), max_model_len) as servers,
    ):
        app = router({server.name: server.socket for server in servers}, token)
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        server = uvicorn.Server(uvicorn.Config(app, ws="none", timeout_graceful_shutdown=5, **quiet))
        threading.Thread(target=_watch, args=(servers, server), daemon=True).start()
        _tell(host, listening.getsockname()[1], list(models), token, origin)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        for each in servers:
            if each.process.poll() is not None:
                raise ChildProcessError(f"the server of {each.name} ended by itself: {each.last_words()}")
    console.print("serve: closed")


class ModelServer:
    """vLLM's OpenAI server of one model, a process of its own that listens at a Unix socket."""

    def __init__(self, name: str, command: list[str], directory: Path, threads: int) -> None:
        self.name = name
        self.socket, self._log = directory / "socket", directory / "log"
        variables = environment_variables(GeneratorConfig(threads=threads)) | {"VLLM_CPU_KVCACHE_SPACE": _KV_CACHE_GIB}
        with self._log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, "--uds", str(self.socket)],
                env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for us, who then end it
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def ready(self) -> bool:
        """Whether it answers.

        Raises:
            UserError: it has ended.
        """
        if self.process.poll() is not None:
            raise UserError(f"serve: vLLM cannot serve {self.name}: {self.last_words()}")
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket))) as client:
                return client.get("http://model/health").status_code == 200
        except httpx.TransportError:
            return False

    def last_words(self) -> str:
        """The last line of its log that tells an error, or the last line."""
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        told = [line for line in lines if "Error" in line] or [line for line in lines if line] or ["it said nothing"]
        return told[-1][-300:]

    def end(self) -> None:
        """End it and whatever it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_S)


@contextlib.contextmanager
def started(
    run: RunFolder, models: Mapping[str, str], directory: Path, max_model_len: int | None
) -> Iterator[list[ModelServer]]:
    """A server for each model during the block, all of them ready at its start.

    Raises:
        UserError: vLLM cannot serve one of them, or takes too long.
    """
    config = stored_config(run)
    threads = max((os.cpu_count() or 1) // len(models), 1)
    servers: list[ModelServer] = []
    began = time.monotonic()
    try:
        with console.status(Text(f"starting {', '.join(models)}")):
            for number, (name, place) in enumerate(models.items()):
                own = directory / str(number)
                own.mkdir()
                path = local_copy(place)
                command = vllm_command(run, name, path, config.model.revision, own, len(models), max_model_len)
                servers.append(ModelServer(name, command, own, threads))
            waiting = list(servers)
            while waiting:
                waiting = [server for server in waiting if not server.ready()]
                if waiting and time.monotonic() - began > _START_S:
                    raise UserError(
                        f"serve: {waiting[0].name} did not answer within {_START_S:.0f} s; its last line: "
                        f"{waiting[0].last_words()}"
                    )
                time.sleep(_POLL_S if waiting else 0)
        console.print(f"serve: {len(servers)} models ready after {time.monotonic() - began:.0f} s")
        yield servers
    finally:
        for server in servers:  # at once, and then one after the other
            server.process.terminate()
        for server in servers:
            server.end()


def vllm_command(
    run: RunFolder, name: str, path: str, revision: str | None, directory: Path, models: int, max_model_len: int | None
) -> list[str]:
    """The command line of a model's server, without its socket; writes its chat template into `directory`.

    Args:
        models: how many share this machine.
    """
    config = stored_config(run)
    wanted = max(USUAL_LENGTH, config.data.max_prompt_tokens + config.data.max_response_tokens)
    options = {
        "model": path,
        "served-model-name": name,
        "load-format": "safetensors",  # vLLM would also unpickle a *.bin
        "dtype": config.model.dtype,
        "max-model-len": str(max_model_len or min(wanted, context_length(path))),
        "max-num-seqs": str(config.resources.generators.max_num_seqs),
    }
    if revision is not None and not Path(path).is_dir():
        options["revision"] = revision
    tokenizer = load_tokenizer(path, revision)
    if (template := chat_template_of(tokenizer, template_of_run(run, tokenizer))) is not None:
        (directory / "chat.jinja").write_text(template, encoding="utf-8")
        options["chat-template"] = str(directory / "chat.jinja")
    if torch.cuda.is_available():
        options["gpu-memory-utilization"] = f"{config.resources.generators.gpu_memory_utilization / models:.3f}"
        flags = []
    else:
        flags = ["--enforce-eager"]  # compiling for a CPU takes minutes
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *flags,
            "--disable-uvicorn-access-log"]  # fmt: skip


def _watch(servers: list[ModelServer], server: uvicorn.Server) -> None:
    """End the address when a model's server has ended."""
    while not server.should_exit:
        if any(each.process.poll() is not None for each in servers):
            server.should_exit = True
        time.sleep(1.0)


def _tell(host: str, port: int, names: list[str], token: str, origin: str) -> None:
    shown = f"[{host}]" if ":" in host else host
    lines = [f"http://{shown}:{port}/v1", f"models: {', '.join(names)}"]
    lines.append(f"the token is that of {origin}" if origin else f"token, which is not shown again: {token}")
    if host not in LOOPBACK:
        lines.append(f"other machines can reach {host}; without TLS the token travels in the clear")
    for line in [*lines, "Ctrl-C ends it"]:
        say(f"serve: {line}")  # not through rich, which would break long lines


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
