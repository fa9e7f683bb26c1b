"""What failed in some process of a run, in one line: its words, its remedy, whether a restart helps, and no secret."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors import safe_open

from actors.pools.remote import ActorDied, ActorFailure, Call, CouldNotStart, Restarted, answer, death_of
from actors.training.tasks import BeatingRank, Failed, GroupEnd, Tasks
from actors.training.workers import seen_by_ray_train
from rayrlhf.errors import UserError
from rayrlhf.failures import CAUSE_CHARACTERS, cause_of, last_error, lasting, locate, told
from rayrlhf.redaction import redacted

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Generator\n\tpid: 7\nThe actor is dead "
    "because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits "
    "with a connection error code 2. End of file. There are some potential root causes. (1) The process is killed by "
    "SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The worker is crashed "
    "unexpectedly due to SIGSEGV or other unexpected errors."
)


def os_error(number: int, path: str = "/data/x") -> OSError:
    return OSError(number, os.strerror(number), path)


def raised_by(action: Any) -> Exception:
    with pytest.raises(Exception) as raised:
        action()
    assert isinstance(raised.value, Exception)
    return raised.value


def died(words: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = words
    return error


@pytest.mark.parametrize(
    ("error", "line", "again"),
    [
        (os_error(errno.ENOSPC), "OSError: No space left on device: '/data/x'; free space on that disk", True),
        (os_error(errno.EACCES), "PermissionError: Permission denied: '/data/x'; give this user the right to it", True),
        (os_error(errno.EIO), "OSError: Input/output error: '/data/x'; look after that disk or mount", False),
        (ActorFailure("coordinator died during next_batch: x"), "coordinator died during next_batch: x", True),
        (ActorFailure("generator-0 died during advance: x"), "generator-0 died during advance: x", False),
        (RuntimeError("two\nlines  here"), "RuntimeError: two lines here", False),
        (KeyError("x"), "KeyError: 'x'", False),
        (ZeroDivisionError(), "ZeroDivisionError", False),
        (FloatingPointError("the norm is nan"), "the norm is nan", False),
    ],
)
def test_a_line_for_each_kind_and_whether_a_restart_would_only_meet_it_again(
    error: Exception, line: str, again: bool
) -> None:
    assert told(error).startswith(line)
    assert lasting(cause_of(error)) is again
    locate(error, "rl step 13")
    locate(error, "rl")
    assert told(error).startswith(f"rl step 13: {line}")
    # Told by another process, it gets no second remedy.
    assert told(ActorFailure(told(error))) == told(error)


def test_damaged_files_of_safetensors_and_torch_say_what_to_do(tmp_path: Path) -> None:
    cut = tmp_path / "model.safetensors"
    cut.write_bytes((1000).to_bytes(8, "little") + b"{")
    state = tmp_path / "state.pt"
    torch.save({"step": 1}, state)
    state.write_bytes(state.read_bytes()[:-40])
    for action in (lambda: safe_open(cut, "pt"), lambda: torch.load(state)):
        error = raised_by(action)
        line = told(error)
        assert line.startswith(type(error).__name__) and "is cut short or damaged: copy it again" in line, line
        assert lasting(cause_of(error)) and "\n" not in line


def test_long_words_keep_their_beginning() -> None:
    line = told(ValueError("start " + "x" * 5000))
    assert line.startswith("ValueError: start xx") and line.endswith("x ...")
    assert len(line) == len("ValueError: ") + CAUSE_CHARACTERS + len(" ...")


def test_the_last_error_of_a_traceback() -> None:
    def deep() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise UserError("row 3 is bad;\n mend it") from error

    import traceback

    text = "".join(traceback.format_exception(raised_by(deep)))
    assert last_error(text) == ("UserError", "row 3 is bad; mend it")
    assert last_error('Traceback (most recent call last):\n  File "a", line 1\nSystemExit\n') == ("SystemExit", "")
    assert last_error("nothing of that kind 7") == ("", "nothing of that kind 7")


# ---- of actors


def outcome_of(error: Exception) -> Exception:
    """What a call of `generator-0.advance` whose future has this error raises here."""
    call = Call("generator-0", "advance", None, False, 0.0)

    class Done:
        def result(self) -> Any:
            raise error

    return raised_by(lambda: answer(call, Done()))  # type: ignore[arg-type]


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("f()", f'Traceback (most recent call last):\n  File "a"\n{type(cause).__name__}: x', cause)


def test_what_an_actor_raised_is_one_line_with_its_name() -> None:
    failure = outcome_of(task_error(os_error(errno.ENOSPC)).as_instanceof_cause())
    assert type(failure) is ActorFailure
    assert str(failure) == (
        "generator-0.advance raised OSError: No space left on device: '/data/x'; free space on that disk"
    )
    assert isinstance(failure.__cause__, RayTaskError)  # for the log

    class Unsendable(Exception):
        def __init__(self) -> None:
            super().__init__("cannot travel")
            self.lock = __import__("threading").Lock()

    assert str(outcome_of(task_error(Unsendable()))) == "generator-0.advance raised Unsendable: x"

    failure = outcome_of(task_error(Restarted()).as_instanceof_cause())
    assert type(failure) is ActorDied and str(failure).startswith("generator-0 died before advance: ")


def test_what_a_constructor_raised_is_no_death_without_a_reason() -> None:
    def init_failed(cause: Exception) -> ActorDiedError:
        text = (
            f'Traceback (most recent call last):\n  File "a.py", line 1, in __init__\nx.{type(cause).__name__}: {cause}'
        )
        return ActorDiedError(RayTaskError("Scorer.__init__", text, cause, actor_id="ab"))

    failure = outcome_of(init_failed(os_error(errno.ENOSPC)))
    assert type(failure) is CouldNotStart and isinstance(failure, ActorDied)
    assert str(failure) == (
        "generator-0 could not start: OSError: No space left on device: '/data/x'; free space on that disk"
    )
    failure = outcome_of(init_failed(UserError("model 'x': weights are missing")))
    assert type(failure) is UserError and str(failure) == "model 'x': weights are missing"


@pytest.mark.parametrize(
    ("rays", "plain"),
    [
        (KILLED, "its process ended at once: kill -9, a crash, or out of memory, which `dmesg` tells"),
        (
            "The actor ab is unavailable: The actor is temporarily unavailable: RpcError: RPC error: Socket closed",
            "its process ended at once: kill -9, a crash, or out of memory, which `dmesg` tells",
        ),
        ("x unavailable: IOError: The actor is restarting.. The task may or may not", "its process had ended before"),
        ("x unavailable: IOError: The actor was restarted. The task may or may not", "its process had ended before"),
        ("x The actor is dead because it was killed by `ray.kill`.", "it was ended by ray.kill"),
        ("x The actor died because its node has died. Node Id: ab the actor's node was terminated", "its node is gone"),
        ("x The actor is dead because its owner has died. Owner Id: ab", "the process that owns it is gone"),
        ("x Task was killed due to the node running low on memory.", "Ray ended it because its node was low on memory"),
        ("y" * 400 + " something new", ("y" * 400 + " something new")[-300:]),
    ],
)
def test_why_an_actor_died(rays: str, plain: str) -> None:
    assert death_of(died(rays)) == plain
    assert str(outcome_of(died(rays))) == f"generator-0 died during advance: {plain}"


# ---- of the learner's workers


def test_ray_trains_error_names_the_dead_rank_and_not_those_that_hear_of_it() -> None:
    dead = WorkerHealthCheckFailedError("A worker health check failed.", died(KILLED))
    other = RuntimeError("[gloo/transport] Connection closed by peer [127.0.0.1]:4711")
    seen, is_dead = seen_by_ray_train(WorkerGroupError("x" * 9000, {0: other, 1: dead}))
    assert is_dead and seen.cause.startswith("learner rank 1 died: its process ended at once")
    seen, is_dead = seen_by_ray_train(WorkerGroupError("x", {2: ValueError("a\nb")}))
    assert (seen.cause, is_dead) == ("learner rank 2 raised ValueError: a b", False)


def test_news_of_the_worker_group_say_what_is_left_and_name_the_first_cause() -> None:
    tasks = Tasks(workers=2, max_failures=3)
    own = Failed("learner rank 0 raised ValueError: bad", "rl step 4", "own traceback")
    peer = Failed("learner rank 1 raised RuntimeError: Connection closed by peer", "rl step 4", "peer's traceback")
    rays = Failed("learner rank 1 raised RuntimeError: Connection closed by peer", None, "Ray's")
    killed = Failed("learner rank 1 died: its process ended", None, "Ray's")

    async def story() -> list[bool]:
        same = [await tasks.failed(peer), await tasks.failed(own)]
        await tasks.group_failed(rays, dead=False, end=GroupEnd.RESTARTS)
        same += [await tasks.failed(own._replace(place="rl step 5")), await tasks.failed(own), await tasks.failed(peer)]
        await tasks.group_failed(killed, dead=True, end=GroupEnd.RESTARTS)
        same += [await tasks.failed(own), await tasks.failed(peer)]
        await tasks.group_failed(killed, dead=True, end=GroupEnd.RESTARTS)
        same += [await tasks.failed(peer)]  # after a death that it told of, too: the next one may be another
        await tasks.group_failed(rays, dead=False, end=GroupEnd.FINAL)
        await tasks.group_failed(Failed("the learner's workers could not start: x"), False, GroupEnd.TRIES_AGAIN)
        return same

    assert asyncio.run(story()) == [False, False, False, True, False, False, False, False]
    first, second, third, last, unable = asyncio.run(tasks.news(0))
    assert first.text == (
        "rl step 4: learner rank 0 raised ValueError: bad; the learner goes on from its last checkpoint, "
        "2 of 3 restarts left"
    )
    assert "own traceback" in first.traceback and "peer's traceback" in first.traceback and not first.final
    assert second.text.startswith("learner rank 1 died: its process ended; the learner goes on")
    assert second.text.endswith("1 of 3 restarts left") and third.text.endswith("0 of 3 restarts left")
    assert not third.final and last.final
    assert last.text.endswith("look for its line; its 3 restarts are used up (resources.learner.max_failures=3)")
    assert unable.text == "the learner's workers could not start: x; they have another try" and not unable.final
    assert asyncio.run(tasks.news(3)) == [last, unable]


def test_news_name_the_rank_that_was_killed_for_its_silence_and_have_its_stacks() -> None:
    tasks = Tasks(workers=2, max_failures=2)
    first, second = BeatingRank(0, "a"), BeatingRank(1, "b")
    why = Failed("learner rank 1 gave no sign of life for 60 s and was killed", None, "stacks of rank 1")
    peer = Failed("learner rank 0 raised RuntimeError: Connection closed by peer", "rl step 4", "peer's traceback")
    killed = Failed("learner rank 1 died: its process ended at once: kill -9", None, "Ray's")

    async def story() -> list[list[BeatingRank]]:
        for rank in (first, second):
            await tasks.rank_beats(rank)
        there = [await tasks.beating()]
        await tasks.rank_silent(second, why)
        await tasks.failed(peer)
        await tasks.group_failed(killed, dead=True, end=GroupEnd.RESTARTS)
        there.append(await tasks.beating())
        await tasks.rank_beats(BeatingRank(1, "c"))
        await tasks.rank_silent(second, why)  # too late: of the group before
        await tasks.group_failed(killed, dead=True, end=GroupEnd.RESTARTS)
        return there

    assert asyncio.run(story()) == [[first, second], []]
    silent, dead = asyncio.run(tasks.news(0))
    assert silent.text == f"{why.cause}; the learner goes on from its last checkpoint, 1 of 2 restarts left"
    assert silent.traceback == "stacks of rank 1\nRay's\npeer's traceback"
    assert dead.text.startswith(killed.cause) and dead.traceback == "Ray's"


# ---- secrets


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("http://ann:pw@host:80/v1", "http://***@host:80/v1"),
        ("url: https://h/x?a=1&token=abc&b=2", "url: https://h/x?a=1&token=***&b=2"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer ***"),
        ("HF_TOKEN=hf_abcdefghijklmnopqrstuv", "HF_TOKEN=***"),
        ("said hf_abcdefghijklmnopqrstuv there", "said *** there"),
        ("AWS_SECRET_ACCESS_KEY=abc/def+x and more", "AWS_SECRET_ACCESS_KEY=*** and more"),
        ('{"api_key": "a b c", "n": 1}', '{"api_key": ***, "n": 1}'),
        ("password: hunter2", "password: ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_secrets_are_taken_out(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted(left) == left


@pytest.mark.parametrize(
    "text",
    ["max_prompt_tokens: 96", "pad_token_id: 1", "token_variable: JUDGE_TOKEN", "eos_token: </s>", "stop_token: '|'",
     "micro_batch_tokens: auto", "tokenizer: opt", "s3://b/x?region=eu", "key 'rl.steps': bad", "token_file: null"],
)  # fmt: skip
def test_words_of_language_models_are_no_secrets(text: str) -> None:
    assert redacted(text) == text
