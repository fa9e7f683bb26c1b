"""Which silent process stands still, by what Linux says of it from outside, and its end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.pools.autopsy import end, examine_if_still
from actors.pools.beats import Beat
from actors.pools.remote import this_node

PROGRAM = """
import itertools, os, signal, sys, tempfile, threading
stacks = tempfile.NamedTemporaryFile(prefix="rayrlhf-stacks-")
print(threading.get_native_id(), stacks.fileno(), stacks.name, flush=True)
if sys.argv[1] == "waits":
    threading.Event().wait()
elif sys.argv[1] == "works":
    all(itertools.repeat(True))  # in one call, which holds Python's lock for good
elif sys.argv[1] == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
"""

Start = Callable[[str], Beat]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a process that does one thing, and returns what its beat would say."""
    monkeypatch.setattr("actors.pools.autopsy._STILL_S", 0.5)
    processes = []

    def begin(what: str) -> Beat:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, what], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        thread, descriptor, name = process.stdout.readline().split()
        return Beat(1, 1, process.pid, int(thread), this_node(), (int(descriptor), name))

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def found(beat: Beat) -> str:
    """What is found once the process is at what it is to do."""
    deadline = time.monotonic() + 600
    while not (whole := examine_if_still(beat)):
        assert time.monotonic() < deadline
    return whole


def test_one_that_is_stopped_or_waits_stands_still(start: Start) -> None:
    stopped, waits = start("stopped"), start("waits")
    assert found(stopped).startswith(f"process {stopped.pid}: state T")
    assert found(waits).startswith(f"process {waits.pid}: state S")


def test_one_that_works_in_a_single_call_does_not_stand_still(start: Start) -> None:
    works = start("works")
    assert [examine_if_still(works) for _ in range(3)] == ["", "", ""]


def test_nothing_is_done_to_another_process_of_the_same_number(start: Start) -> None:
    waits = start("waits")
    other = waits._replace(stacks=(waits.stacks[0], "/tmp/rayrlhf-stacks-of-one-that-is-gone"))
    assert examine_if_still(other) == ""
    end(other)
    assert found(waits)
    end(waits)
    deadline = time.monotonic() + 600
    while "\nState:\tZ" not in Path(f"/proc/{waits.pid}/status").read_text():  # it is this process' child
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert examine_if_still(waits) == ""
