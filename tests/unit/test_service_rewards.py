"""Rewards by a service and by a judge, against real servers on loopback that are slow, fail and answer rubbish."""

from __future__ import annotations

import datetime
import json
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.rewards import posting
from rayrlhf.rewards.texts import TextRewards, make_text_rewards
from rayrlhf.trajectory import SerializedTrajectory, Trajectory
from tests.unit.test_python_rewards import trajectories

PROMPTS = [Prompt("p0", "What?", "a cat slept"), Prompt("p1", "And then?", "it left")]
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


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    monkeypatch.setattr(posting, "FIRST_WAIT_S", 0.001)
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


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


# ---- judges


def says(choose: Callable[[str], str]) -> Answer:
    """A chat completion by what it is asked."""

    def answer(body: Any) -> tuple[int, str]:
        message = {"role": "assistant", "content": choose(body["messages"][0]["content"])}
        return 200, json.dumps({"choices": [{"message": message}], "usage": {"total_tokens": 7}})

    return answer


def judge(server: Server, **more: Any) -> TextRewards:
    url = server.url + "/v1/"
    return rewards_of(kind="judge", url=url, model="m", rubric="Cats are good.", **more)


def test_a_judge_rates_each_question_once_and_says_what_it_cost(serve: Any) -> None:
    server = serve(says(lambda text: "10" if "cat" in text.partition("Answer:")[2] else "3."))
    reward, given = judge(server, body={"top_k": 1}), trajectories()
    assert reward(given) == {"mine": [1.0, 0.3, 1.0]}
    path, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["temperature"] == 0.0 and body["top_k"] == 1
    assert body["messages"][0]["content"].startswith("Cats are good.") and body["model"] == "m"
    assert [t.counted for t in given] == [{"judge_tokens": 7}] * 3
    again = trajectories()
    assert reward(again) == {"mine": [1.0, 0.3, 1.0]} and len(server.asked) == 3
    assert [t.counted for t in again] == [{"judge_tokens": 0}] * 3
    sent: Trajectory = SerializedTrajectory.of(given[0]).load()
    assert sent.counted == {"judge_tokens": 7}


def test_a_pair_is_judged_in_both_orders(serve: Any) -> None:
    """A judge that always prefers the first answer says nothing; one that likes dogs prefers the third response."""
    always_first = judge(serve(says(lambda text: "A")), compare="reference")
    assert always_first(trajectories()) == {"mine": [0.5, 0.5, 0.5]}

    def dogs(text: str) -> str:
        a, _, b = text.partition("Answer B:")
        return "Answer A" if "dog" in a else "B" if "dog" in b else "C"

    assert judge(serve(says(dogs)), compare="reference")(trajectories()) == {"mine": [0.5, 0.5, 1.0]}


@pytest.mark.parametrize(
    ("compare", "reply", "said"),
    [
        ("nothing", "great!", "said 'great!' of prompt 'p0', sample 0; it was asked for a number from 0 to 10"),
        ("nothing", "11", "it was asked for a number from 0 to 10"),
        ("reference", "both", "it was asked for A, B or C"),
    ],
)
def test_a_judge_that_says_something_else_is_one_line(serve: Any, compare: str, reply: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        judge(serve(says(lambda text: reply)), compare=compare)(trajectories())
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_judge_without_a_reference_and_a_server_of_something_else(serve: Any, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="no OpenAI chat completion"):
        judge(serve(lambda body: (200, "{}")))(trajectories())
    monkeypatch.setattr("tests.unit.test_service_rewards.PROMPTS", [Prompt("p0", "?"), Prompt("p1", "?")])
    with pytest.raises(UserError, match="prompt 'p0' has no reference to compare with; set compare: nothing"):
        judge(serve(says(lambda text: "A")), compare="reference")(trajectories())


@pytest.mark.parametrize("url", ["localhost:8000", "http://me:key@host/score", "ftp://host"])
def test_an_address_with_a_key_or_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="url"):
        rewards_of(kind="http", url=url)
