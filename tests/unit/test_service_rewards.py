"""Rewards by a service, against real servers on loopback that are slow, fail and answer rubbish."""

from __future__ import annotations

import datetime
import json
import math
import pickle
import threading
from typing import Any

import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.rewards.texts import TextRewards, make_text_rewards
from tests.servers import Answer, Server
from tests.unit.test_python_rewards import trajectories

PROMPTS = [Prompt("p0", "What?", "a cat slept"), Prompt("p1", "And then?", "it left")]


def rewards_of(**reward: Any) -> TextRewards:
    """As a scorer gets them: pickled."""
    config = parse_config({"name": "run", "rewards": [{"name": "mine", **reward}]}, "test")
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    made: TextRewards = pickle.loads(pickle.dumps(TextRewards(make_text_rewards(config.rewards), PROMPTS, tokenizer)))
    return made


def lengths(body: Any) -> tuple[int, str]:
    return 200, json.dumps({"scores": [len(item["response"]) for item in body["items"]]})


def http(server: Server, **more: Any) -> TextRewards:
    return rewards_of(kind="http", url=server.url + "/score", **more)


def test_a_service_is_told_all_and_answers_in_order(serve: Any) -> None:
    server = serve(lengths)
    found = http(server, weight=0.5, batch_size=2, concurrency=1, settings={"style": "dry"})(trajectories())
    assert found == {"mine": [5.5, 1.0, 10.5]}
    (path, first), (_, second) = server.asked
    assert path == "/score" and first["name"] == "mine" and first["settings"] == {"style": "dry"}
    assert first["items"][1] == {
        "prompt_id": "p0", "sample": 1, "prompt": "What?", "response": "no", "reference": "a cat slept",
    }  # fmt: skip
    assert [item["response"] for item in second["items"]] == ["a dog barked at a cat"]
    assert "Authorization" not in server.headers_seen[0]


def test_a_service_gets_metadata_on_request(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JSON lacks arrives as text."""
    when = datetime.date(2026, 1, 31)
    rows = [{"tests": ["1 == 1"], "since": when, "rate": math.nan}, {}]
    prompts = [Prompt(f"p{i}", "?", metadata=row) for i, row in enumerate(rows)]
    monkeypatch.setattr("tests.unit.test_service_rewards.PROMPTS", prompts)
    server = serve(lengths)
    assert http(server, metadata=True)(trajectories()) == {"mine": [11.0, 2.0, 21.0]}
    ((_, body),) = server.asked
    as_text = {"tests": ["1 == 1"], "since": "2026-01-31", "rate": "NaN"}
    assert [item["metadata"] for item in body["items"]] == [as_text, as_text, {}]


def test_a_busy_service_is_asked_again(serve: Any) -> None:
    tries: list[int] = []

    def busy(body: Any) -> tuple[int, str]:
        tries.append(len(tries))
        return (503, "later") if len(tries) < 3 else lengths(body)

    assert http(serve(busy))(trajectories())["mine"] == [11.0, 2.0, 21.0]
    assert len(tries) == 3


def test_only_so_many_requests_are_under_way(serve: Any) -> None:
    together = threading.Barrier(2)

    def meet(body: Any) -> tuple[int, str]:
        together.wait(600)  # two are there at once, or this would not end
        return lengths(body)

    server = serve(meet)
    http(server, batch_size=1, concurrency=2)([*trajectories(), trajectories()[0]])
    assert server.most_at_once == 2


def test_a_token_comes_from_the_environment(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lengths)
    reward = http(server, token_variable="MY_TOKEN")
    with pytest.raises(UserError, match="the environment variable MY_TOKEN is not set"):
        reward(trajectories())
    monkeypatch.setenv("MY_TOKEN", "secret")
    reward(trajectories())
    assert server.headers_seen[0]["Authorization"] == "Bearer secret"


GIVEN_UP = threading.Event()


def silent(body: Any) -> tuple[int, str]:
    """Answers when nobody waits any more."""
    GIVEN_UP.wait(600)
    return lengths(body)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda body: (500, "out of memory"), "status 500: out of memory, after 3 tries"),
        (lambda body: (400, "no such style"), "status 400: no such style"),
        (silent, "no answer for 1 s, after 3 tries"),
        (lambda body: (200, "hello"), "its answer is no JSON: hello"),
        (lambda body: (200, '{"score": 1}'), "no list of scores"),
        (lambda body: (200, '{"scores": [1.0]}'), "answered with 1 scores for 3 items"),
        (lambda body: (200, '{"scores": [1.0, NaN, 2.0]}'), "answered with nan for prompt 'p0', sample 1"),
        (lambda body: (200, '{"scores": [1.0, 2.0, "good"]}'), "answered with 'good' for prompt 'p1', sample 2"),
    ],
)
def test_what_a_service_does_wrong_is_one_line(serve: Any, answer: Answer, said: str) -> None:
    server = serve(answer)
    GIVEN_UP.clear()
    with pytest.raises(UserError) as raised:
        # Others may take as long as they like: on a busy machine an answer that comes at once may take a second.
        http(server, timeout_s=1 if answer is silent else 600, retries=2)(trajectories())
    GIVEN_UP.set()
    message = str(raised.value)
    assert said in message and "reward 'mine' (http://127.0.0.1:" in message and "\n" not in message
    assert len(server.asked) == (3 if "after 3 tries" in said else 1)


def test_nobody_there_is_one_line(serve: Any) -> None:
    server = serve(lengths)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="ConnectError: .* after 2 tries"):
        http(server, retries=1)(trajectories())


@pytest.mark.parametrize("url", ["localhost:8000", "http://me:key@host/score", "ftp://host"])
def test_an_address_with_a_key_or_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="url"):
        rewards_of(kind="http", url=url)
