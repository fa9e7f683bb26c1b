"""The temporary files of a command go with it, however it ends, and those of others stay."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._common.utils import get_default_ray_temp_dir
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from jobs.guard import guarded
from rayrlhf.errors import UserError
from rayrlhf.files import cache_directory
from rayrlhf.scratch import LOCK, _claim, _remove, nameless_semaphores, scratch, sweep
from tests.leftovers import held, named

ROOT = Path(__file__).parents[2]
CHILD = """
import socket, sys, tempfile
from pathlib import Path
from rayrlhf.scratch import scratch
with scratch():
    directory = Path(tempfile.mkdtemp())
    (directory / "file").write_text("text")
    held = socket.socket(socket.AF_UNIX)
    held.bind(str(directory / "socket"))
    print(directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def outer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for temporary files; its path is short, since Unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(directory)


class Command:
    """A process that keeps temporary files until it is told to end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.own = Path(self.process.stdout.readline().strip())
        self.directory = self.own.parent

    def end(self, number: signal.Signals | None = None) -> int:
        if number:
            self.process.send_signal(number)
        self.process.communicate("")
        return self.process.returncode


def content(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_what_a_killed_command_leaves_goes_when_the_next_one_starts_and_nothing_else(outer: Path) -> None:
    killed, stopped, alive = Command(), Command(), Command()
    parent = alive.directory.parent
    assert parent == outer / f"rlhf-{os.getuid()}" and parent.stat().st_mode & 0o777 == 0o700
    (parent / "of-others").mkdir()
    stopped.process.send_signal(signal.SIGSTOP)
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    assert content(killed.own) == {"file", "socket"}
    with scratch():
        assert not killed.directory.exists() and not killed.directory.with_suffix(LOCK).exists()
        for each in (stopped, alive):
            assert content(each.own) == {"file", "socket"} and each.directory.with_suffix(LOCK).exists()
        assert len(content(parent)) == 2 * 3 + 1
    stopped.process.send_signal(signal.SIGCONT)
    assert (stopped.end(), alive.end()) == (0, 0)
    assert content(parent) == {"of-others"}


def test_this_process_and_its_children_get_the_directory_and_give_it_back(outer: Path) -> None:
    before = dict(os.environ)
    show = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
    with pytest.raises(KeyError), scratch():
        inside = Path(tempfile.gettempdir())
        assert inside.parent.parent == outer and inside.is_dir()
        assert subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip() == str(inside)
        os.environ["OF_THE_BLOCK"] = "stays"
        raise KeyError
    assert os.environ.pop("OF_THE_BLOCK") == "stays" and dict(os.environ) == before
    assert tempfile.gettempdir() == str(outer) and not inside.exists()


def test_what_is_to_stay_is_not_in_the_directory(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's sessions, what torch has compiled, and our cache where there is no home for one."""
    for name in ("RAY_TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "RAYRLHF_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    expected = get_default_ray_temp_dir(), default_cache_dir(), cache_directory()
    assert all(Path(path).parent == outer for path in expected)
    with scratch():
        assert (get_default_ray_temp_dir(), os.environ["TORCHINDUCTOR_CACHE_DIR"], cache_directory()) == expected
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    with scratch():
        assert get_default_ray_temp_dir() == "/elsewhere/ray"


def test_commands_that_start_and_end_at_once_keep_what_is_theirs(outer: Path) -> None:
    """Each sweeps between any two steps of the others."""
    parent = outer / "rlhf"
    parent.mkdir(mode=0o700)
    lost: list[str] = []
    swept: list[Path] = []

    def work() -> None:
        for _ in range(40):
            swept.extend(sweep(parent))
            claimed = _claim(parent)
            assert claimed
            directory, lock = claimed
            (directory / "file").write_text("mine")
            swept.extend(sweep(parent))
            if not (directory / "file").exists():
                lost.append(str(directory))
            _remove(directory, lock)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost and not content(parent)


def test_a_lock_that_is_swept_before_it_is_held_is_made_anew(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command may come between the making of the file and its lock."""
    made: list[str] = []
    open_file = os.open

    def open_and_sweep(path: Any, flags: int, mode: int = 0o777) -> int:
        found = open_file(path, flags, mode)
        if flags & os.O_CREAT:
            made.append(str(path))
        elif len(made) == 1:
            os.unlink(path)  # as `sweep` does, which has the lock until then
        return found

    with monkeypatch.context() as patched:
        patched.setattr("rayrlhf.scratch.os.open", open_and_sweep)
        claimed = _claim(outer)
    assert claimed and len(made) == 2
    assert made == [made[0], str(claimed[0].with_suffix(LOCK))] and claimed[0].is_dir()


@pytest.mark.parametrize("trap", ["a link", "open to all", "a file"])
def test_a_place_that_others_reach_is_refused(trap: str, outer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = outer / f"rlhf-{os.getuid()}"
    (outer / "theirs").mkdir()
    if trap == "a link":
        parent.symlink_to(outer / "theirs")
    elif trap == "open to all":
        parent.mkdir()
        parent.chmod(0o777)
    else:
        parent.touch()
    with pytest.raises(UserError, match="is no directory of yours alone; remove it, or set TMPDIR"), scratch():
        pytest.fail("it went on")
    assert guarded(lambda: pytest.fail("it went on")) == 2
    assert str(parent) in capsys.readouterr().err


def test_without_room_commands_go_on(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need none; and where the directory would be too deep for Unix sockets."""

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        with scratch():
            assert tempfile.gettempdir() == str(outer)
    deep = outer / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with scratch():
        assert tempfile.gettempdir() == str(deep) and not content(deep / f"rlhf-{os.getuid()}")


def test_every_command_has_one(outer: Path) -> None:
    seen: list[Path] = []

    def action() -> None:
        seen.append(Path(tempfile.gettempdir()))
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(seen[0] / "socket"))

    assert guarded(action) == 0
    assert seen[0].parent == outer / f"rlhf-{os.getuid()}" and not seen[0].exists()


def test_semaphores_of_the_block_have_no_name() -> None:
    """Wherever processes are spawned, others have one."""
    own = [os.getpid()]
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        others = named(held(own))
        with nameless_semaphores():
            inside = multiprocessing.Lock()
        assert named(held(own)) == others
        outside = multiprocessing.Lock()
        assert len(named(held(own)) - others) == 1
        for lock in (inside, outside):
            assert lock.acquire(timeout=10) and not lock.acquire(block=False)
        del lock, outside
        assert named(held(own)) == others, "multiprocessing takes the name away with the semaphore"
    finally:
        multiprocessing.set_start_method(before, force=True)
