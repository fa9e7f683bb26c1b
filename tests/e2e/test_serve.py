"""`rayrlhf serve` with vLLM's own servers: what comes is the model's, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import APIStatusError, OpenAI

from rayrlhf.data.tokens import encode_prompt
from rayrlhf.models.loading import load_policy, load_tokenizer
from rayrlhf.runs.folder import RunFolder
from tests.finished import POST, finished_run

# Starts two of vLLM's servers, about a minute; unit/test_router has the address before servers of a few lines.
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


class Serving:
    """The command, while it serves."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "serve", str(run.path), "--port", "0", "--max-model-len", "256"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if "Ctrl-C" in line:
                break
        url = re.search(r"serve: (http\S+)", self.said)
        token = re.search(r"token, which is not shown again: (\S+)", self.said)
        assert url and token, self.said
        self.url, self.token = url[1], token[1]

    def client(self) -> OpenAI:
        return OpenAI(
            base_url=self.url, api_key=self.token, max_retries=0, http_client=httpx.Client(trust_env=False, timeout=300)
        )

    def children(self) -> list[int]:
        """Processes that it has started, and theirs."""
        found, waiting = [], [self.process.pid]
        while waiting:
            own = Path(f"/proc/{waiting.pop()}")
            for task in own.glob("task/*/children"):
                waiting += (new := [int(pid) for pid in task.read_text().split()])
                found += new
        return found


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    found = Serving(finished_run(tmp_path_factory.mktemp("runs")))
    yield found
    if found.process.poll() is None:
        found.process.terminate()
        found.process.wait(120)


def greedy(model: Path, ids: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens of a model and their log-probs, by a plain loop."""
    policy, written, logprobs = load_policy(str(model)), list(ids), []
    with torch.no_grad():
        for _ in range(tokens):
            row = policy(torch.tensor([written])).logits[0, -1].log_softmax(-1)
            written.append(int(row.argmax()))
            logprobs.append(float(row.max()))
            if written[-1] == 2:
                break
    return written[len(ids) :], logprobs


@pytest.mark.parametrize("name", ["sft", "policy"])
def test_each_name_is_its_model(serving: Serving, name: str) -> None:
    """Text, log-probs and a stream are those of a plain loop over the run's own model."""
    client, tokenizer = serving.client(), load_tokenizer(str(serving.run.sft))
    assert [model.id for model in client.models.list()] == ["one/sft", "one/policy"]
    ids, logprobs = greedy(serving.run.path / name, encode_prompt(tokenizer, POST), 8)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    asked: dict[str, Any] = {"model": f"one/{name}", "prompt": POST, "max_tokens": 8, "temperature": 0.0}
    (choice,) = client.completions.create(**asked, logprobs=1).choices
    assert choice.text == expected and choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-3)
    pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == expected and len(pieces) > 1


def test_a_chat_message_is_framed_as_the_runs_prompts(serving: Serving) -> None:
    client, tokenizer = serving.client(), load_tokenizer(str(serving.run.sft))
    prompt = "SUBREDDIT: r/AskReddit\n\nTITLE: \n\nPOST: He ate it.\n\nTL;DR:"
    ids, _ = greedy(serving.run.policy, encode_prompt(tokenizer, prompt), 8)
    answer = client.chat.completions.create(
        model="one/policy", messages=[{"role": "user", "content": "He ate it."}], max_tokens=8, temperature=0.0
    )
    assert answer.choices[0].message.content == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(encode_prompt(tokenizer, prompt))


def test_errors_are_vllms_own(serving: Serving) -> None:
    with pytest.raises(APIStatusError) as raised:
        serving.client().completions.create(model="one/sft", prompt=POST, max_tokens=5000)
    assert raised.value.status_code == 400
    with pytest.raises(APIStatusError) as raised:
        OpenAI(base_url=serving.url, api_key="wrong", max_retries=0).models.list()
    assert raised.value.status_code == 401


def test_ctrl_c_ends_it_and_all_that_it_has_started(serving: Serving) -> None:
    """The last test of the file: nobody asks any more."""
    children = serving.children()
    assert len(children) >= 2
    os.killpg(serving.process.pid, signal.SIGINT)
    assert serving.process.stdout is not None
    rest = serving.process.stdout.read()
    assert serving.process.wait(120) == 0 and "serve: closed" in rest
    assert not [pid for pid in children if Path(f"/proc/{pid}/exe").exists()]
