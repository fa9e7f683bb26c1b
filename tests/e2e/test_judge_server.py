"""A judge behind a real `vllm serve`: its verdicts are those of the served model, computed with transformers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from actors.rollouts.engine import environment_variables
from rayrlhf.config_labellers import JudgeLabellerConfig
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.config_rewards import JudgeReward
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_tokenizer, resolve_model
from rayrlhf.rewards.judge_labeller import JudgeLabeller
from rayrlhf.rewards.judge_questions import prefer, rate
from rayrlhf.rewards.texts import TextRewards, make_text_rewards
from tests.unit.test_python_rewards import TEXTS, trajectories

# It starts a server (half a minute on two idle cores); unit/test_judges and unit/test_judge_labeller have their own.
pytestmark = pytest.mark.long

MODEL = resolve_model("embedded:opt-tiny")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The model has none: it gets the bare text of a question."""
CONTEXT = 512
LETTERS = {"structured_outputs": {"choice": ["A", "B", "C"]}}
DIGITS = {"structured_outputs": {"regex": "[78]"}}
"""Of all ten it would always choose 5, which tells two answers no more apart than a constant."""
RUBRIC = "A good answer is short."
PROMPTS = [Prompt("p0", "What is it?", "It is a dog."), Prompt("p1", "Where is it?", "It is in the garden.")]
ANSWERS = ("It is a cat.", "I do not know, sorry.", "A dog that barks at cats all day.")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    (directory / "chat.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "model": MODEL, "served-model-name": "judge", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": CONTEXT, "max-num-seqs": 8, "chat-template": directory / "chat.jinja",
    }  # fmt: skip
    arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    environment = os.environ | environment_variables(GeneratorConfig(threads=1)) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--enforce-eager"],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            while not _healthy(port):
                assert server.poll() is None, (directory / "log").read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):  # with the children that it may have
                try:
                    os.killpg(server.pid, number)
                    server.wait(60)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


class Oracle:
    """What the model finds likeliest, of a few tokens, by plain transformers."""

    def __init__(self) -> None:
        self.tokenizer, self.model = load_tokenizer(MODEL), load_policy(MODEL)
        self.tokens = 0
        """Read, and written: the verdict and an EOS."""

    def choose(self, text: str, choices: Sequence[str]) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.tokens += len(ids) + 2
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, -1]
        places = [self.tokenizer.convert_tokens_to_ids(choice) for choice in choices]
        return choices[int(logits[places].argmax())]

    def preference(self, prompt: Prompt, a: str, b: str) -> float:
        return {"A": 1.0, "B": 0.0, "C": 0.5}[self.choose(prefer(RUBRIC, prompt.text, a, b, "").text, "ABC")]

    def rating(self, prompt: Prompt, answer: str) -> float:
        return int(self.choose(rate(RUBRIC, prompt.text, answer, "").text, "78")) / 10


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def labeller(url: str, **more: Any) -> JudgeLabeller:
    return JudgeLabeller(JudgeLabellerConfig(url=url, model="judge", rubric=RUBRIC, **more))


def test_a_reward_is_what_the_served_model_prefers(url: str, oracle: Oracle) -> None:
    reward = JudgeReward(name="mine", url=url, model="judge", rubric=RUBRIC, compare="reference", body=LETTERS)
    given, owners = trajectories(), (PROMPTS[0], PROMPTS[0], PROMPTS[1])
    found = TextRewards(make_text_rewards([reward]), PROMPTS, load_tokenizer(MODEL))(given)
    oracle.tokens = 0
    expected = [
        (oracle.preference(p, text, p.reference or "") + 1 - oracle.preference(p, p.reference or "", text)) / 2
        for p, text in zip(owners, TEXTS, strict=True)
    ]
    assert found == {"mine": expected}
    assert sum(t.counted["judge_tokens"] for t in given) == oracle.tokens
    assert [t.counted["judge_unusable"] for t in given] == [0, 0, 0]


def test_a_labeller_ranks_as_the_served_model_prefers(url: str, oracle: Oracle, tmp_path: Path) -> None:
    judge = labeller(url, body=LETTERS, cache=str(tmp_path))
    judge.prepare([(prompt, ANSWERS) for prompt in PROMPTS])
    verdicts = [judge.rank(prompt, ANSWERS) for prompt in PROMPTS]
    oracle.tokens = 0
    first = []
    for prompt, verdict in zip(PROMPTS, verdicts, strict=True):
        wins = dict.fromkeys(ANSWERS, 0.0)
        for a, b in permutations(ANSWERS, 2):
            value = oracle.preference(prompt, a, b)
            wins[a] += value
            wins[b] += 1 - value
            first.append(value)
        assert verdict.scores == tuple(wins[answer] / 4 for answer in ANSWERS)
    facts = judge.facts()
    assert (facts["questions"], facts["tokens"], facts["unusable"]) == (12, oracle.tokens, 0)
    decided = [value for value in first if value != 0.5]
    assert facts["first_preferred"] == pytest.approx(sum(decided) / max(len(decided), 1), abs=1e-4)

    again = labeller(url, body=LETTERS, cache=str(tmp_path))
    assert [again.rank(prompt, ANSWERS) for prompt in PROMPTS] == verdicts
    assert again.facts()["kept"] == 12 and again.facts()["tokens"] == 0


def test_a_labeller_rates_as_the_served_model_does(url: str, oracle: Oracle) -> None:
    judge = labeller(url, compare="rate", body=DIGITS)
    found = [judge.rank(prompt, ANSWERS).scores for prompt in PROMPTS]
    assert found == [tuple(oracle.rating(prompt, answer) for answer in ANSWERS) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "when asked twice for A, B or C; 6 of 6 questions got no usable reply"),  # a base model goes on writing
        ({"model": "another"}, "status 404: "),
        ({"rubric": RUBRIC * CONTEXT}, "status 400: "),
        ({"body": {"structured_outputs": {"choice": []}}}, "status 400: "),
    ],
)
def test_what_goes_wrong_at_the_server_is_one_line(url: str, settings: Any, said: str) -> None:
    section = JudgeLabellerConfig(url=url, model="judge", rubric=RUBRIC).model_copy(update=settings)
    with pytest.raises(UserError) as raised:
        JudgeLabeller(section).rank(PROMPTS[0], ANSWERS)
    message = str(raised.value)
    assert said in message and message.startswith("collect.labeller (judge ") and "\n" not in message
