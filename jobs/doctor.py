"""`rayrlhf doctor RUN`: one archive with what helps to find out why a run failed, and the most likely cause.

    errors.log      what failed, with tracebacks
    config.yaml     of the run
    metrics.jsonl   the last lines, without samples: they hold the user's texts
    layout.txt      names and sizes of the run's files, hashes of small ones
    machine.txt     versions, CPU, memory, disks, limits
    ray/            the last part of Ray's logs of the run's processes, where they are on this machine

Secrets are taken out of every text (`rayrlhf.redaction`), and no environment variable is read into it.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from rayrlhf.errors import UserError, one_line
from rayrlhf.files import fingerprint, replacing
from rayrlhf.machine import free_memory, usable_cores, usable_gpus
from rayrlhf.redaction import redacted
from rayrlhf.reports.overview import Overview, read_overview
from rayrlhf.reports.progress import duration
from rayrlhf.runs.error_log import RAY, entries, moment_of, without_samples
from rayrlhf.runs.folder import RunFolder, run_at
from rayrlhf.runs.metrics import read_lines
from rayrlhf.runs.rounds import newest_round
from rayrlhf.runs.versions import versions

_SMALL = 2**20
"""Bytes up to which a file of the run gets a hash."""
_LINES = 500
"""The last lines of metrics that are packed."""
_TAIL = 200_000
"""Bytes of each log, from its end."""
_RAY_LOGS = 60
"""At most so many of Ray's logs, the newest."""
_ROLE = re.compile(rb":actor_name:(Coordinator|Generator|Scorer|Tasks|RayTrainWorker|TrainController)")
"""How Ray marks the logs of an actor."""


def doctor(address: str, output: Path | None = None) -> tuple[Path, str]:
    """Pack what helps to find out why a run failed.

    Args:
        address: of the run folder, a path or a URI.
        output: the archive; `doctor-NAME.tar.gz` in the current directory if not given.

    Returns:
        The archive, and the most likely cause in one line.

    Raises:
        UserError: there is no such folder, or the archive cannot be written.
    """
    whole = run_at(address)
    if not whole.store and not whole.path.is_dir():
        raise UserError(f"{address}: no such folder; `rayrlhf runs DIR` lists the runs in DIR")
    run = newest_round(whole)
    log = (run.read(run.errors) or b"").decode(errors="replace")
    cause = most_likely_cause(run, log, time.time())
    texts = {
        "cause.txt": cause + "\n",
        "errors.log": log,
        "config.yaml": (run.read(run.config) or b"").decode(errors="replace"),
        "metrics.jsonl": _metrics(run),
        "layout.txt": "\n".join(_layout(whole.path)) + "\n",
        "machine.txt": "\n".join(_machine(whole.path)) + "\n",
    }
    texts |= {f"ray/{path.name}": _tail(path) for path in _ray_logs(log)}
    target = output or Path(f"doctor-{whole.name}.tar.gz")
    try:
        with replacing(target.absolute()) as temporary:
            _write(temporary, target.name.removesuffix(".tar.gz"), texts)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({one_line(error)}); choose another place: --output") from None
    return target, redacted(cause)


def most_likely_cause(run: RunFolder, log: str, now: float) -> str:
    """Why the run is not finished, in one line, by its error log and its metrics."""
    try:
        overview = read_overview(run.address)
    except UserError as error:
        return str(error)
    if overview.holder:
        return f"nothing has ended the run: it is being written by {overview.holder}"
    if overview.current is None:
        return "nothing: the run is finished"
    found = entries(log)
    moment, line = moment_of(found[-1]) if found else (0.0, "")
    if line and moment >= (overview.updated or 0.0):
        return line
    return _silent_end(overview, now) + (f"; the last entry of its error log is older: {line}" if line else "")


def _silent_end(overview: Overview, now: float) -> str:
    stage = overview.current
    assert stage is not None
    if overview.updated is None:
        return f"the run has not begun {stage.name}, and nothing says why"
    where = f"in {stage.name}" + (f" after step {stage.step}" if stage.step else "")
    return (
        f"the run ended {where}, {duration(now - overview.updated)} ago, and has written no error: it was stopped or "
        "killed, or its machine went down; `dmesg` tells of kills for lack of memory"
    )


# ---- what is packed


def _metrics(run: RunFolder) -> str:
    kept = []
    for text in read_lines(run.address).splitlines()[-_LINES:]:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        kept.append(json.dumps(without_samples(line)))
    return "\n".join(kept) + "\n" if kept else ""


def _layout(folder: Path) -> Iterator[str]:
    """A line for each file: bytes, time of the last change, hash if it is small, name."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_symlink() or not path.is_file():
                yield f"{'':>12} {'link' if path.is_symlink() else 'folder':>20} {'':32} {path.relative_to(folder)}"
                continue
            stat = path.stat()
            digest = fingerprint(path)["blake2b"] if stat.st_size <= _SMALL else ""
            changed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stat.st_mtime))
            yield f"{stat.st_size:>12} {changed} {digest:32} {path.relative_to(folder)}"
        except OSError as error:
            yield f"{'':>12} {'':20} {one_line(error)}"


def _machine(folder: Path) -> Iterator[str]:
    for name, version in versions().items():
        yield f"{name} {version}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    yield f"cores {usable_cores()} of {os.cpu_count()}, GPUs {usable_gpus()}"
    yield f"free memory, within the container's limit: {free_memory() / 2**30:.1f} GiB"
    for key in ("model name", "flags"):
        if found := re.search(rf"^{key}\s*: (.*)$", _content("/proc/cpuinfo"), re.MULTILINE):
            yield f"CPU {key}: {found[1]}"
    yield from (line for line in _content("/proc/meminfo").splitlines() if re.match("Mem|Swap|Shmem", line))
    for place in (folder, Path("/tmp"), Path("/dev/shm")):
        if place.exists():
            usage = shutil.disk_usage(place)
            yield f"disk of {place}: {usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    for name in ("RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_MEMLOCK", "RLIMIT_AS"):
        yield f"{name} {resource.getrlimit(getattr(resource, name))}"
    if usable_gpus():
        yield _said("nvidia-smi")


def _ray_logs(log: str) -> list[Path]:
    """Ray's logs of the processes of the run's last job, and of Ray itself, if they are on this machine."""
    found = re.findall(rf"^{re.escape(RAY)}(.+), job (\w+)$", log, re.MULTILINE)
    if not found:
        return []
    logs, job = Path(found[-1][0]) / "logs", found[-1][1]
    heads = {path: _head(path) for path in logs.glob("worker-*")}
    mark = f":job_id:{job}".encode()  # a worker that was there before the job has another one in its file's name
    named = [path for path, head in heads.items() if mark in head and _ROLE.search(head)]
    processes = {path.stem.rsplit("-", 1)[-1] for path in named}
    named += [path for path in logs.glob("python-core-worker-*_*.log") if path.stem.rsplit("_", 1)[-1] in processes]
    named += [path for name in ("raylet.*", "gcs_server.*", "train/*.log") for path in logs.glob(name)]
    return sorted(named, key=lambda path: path.stat().st_mtime)[-_RAY_LOGS:]


def _write(target: Path, name: str, texts: dict[str, str]) -> None:
    with tarfile.open(target, "w:gz") as archive:
        for file, text in texts.items():
            content = redacted(text).encode(errors="replace")
            entry = tarfile.TarInfo(f"{name}/{file}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o644
            archive.addfile(entry, io.BytesIO(content))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode(errors="replace")
    except OSError as error:
        return one_line(error)


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error)
