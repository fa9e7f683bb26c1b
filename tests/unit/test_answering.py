"""A model that answers a person: samples of the right distribution, that repeat, and stop when they are told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rayrlhf.data.records import Message
from rayrlhf.data.template import tldr_prompt
from rayrlhf.data.tokens import encode_prompt
from rayrlhf.data.typed import CHAT, POST, TEXT, Typist, chat_template_of, template_of
from rayrlhf.errors import UserError
from rayrlhf.models.answering import Answer, AnsweringModel, Draw, GumbelNoise, read_together
from rayrlhf.models.loading import load_tokenizer, resolve_model

MODEL = resolve_model("embedded:opt-tiny")
EOS = 2
GREEDY = Draw(0.0, 0, 12, 0, (EOS,))
SAMPLED = Draw(0.8, 5, 12, 0, (EOS,))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> AnsweringModel:
    return AnsweringModel("sft", MODEL, tokenizer)


def test_noise_samples_the_softmax() -> None:
    """A chi-square test of 4,000 draws against the probabilities at the temperature."""
    logits, temperature = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]]), 0.7
    noise = GumbelNoise(temperature, seed=0)
    drawn = [int(noise(torch.empty(1, 0), logits).argmax()) for _ in range(4000)]
    expected = torch.softmax(logits[0] / temperature, 0).double().numpy()
    counts = np.bincount(drawn, minlength=5)
    assert stats.chisquare(counts, expected / expected.sum() * 4000).pvalue > 0.01


def test_the_likeliest_tokens_are_those_of_a_plain_loop(model: AnsweringModel, tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, tldr_prompt("dogs", "My dog", "He ate it.").text)
    answer = model.answer(prompt, GREEDY)
    text = "".join(answer)
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < GREEDY.max_tokens and (ids[-1] != EOS or len(ids) == len(prompt)):
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.ids == tuple(ids[len(prompt) :])
    assert text == tokenizer.decode(answer.ids, skip_special_tokens=True)


def test_samples_repeat_by_their_seed_whoever_else_answers(model: AnsweringModel, tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, "A house")

    def drawn(draw: Draw) -> tuple[int, ...]:
        answer = model.answer(prompt, draw)
        list(answer)
        return answer.ids

    alone = drawn(SAMPLED)
    torch.manual_seed(1)
    together = {name: model.answer(prompt, SAMPLED) for name in ("a", "b")}
    read: dict[str, str] = {"a": "", "b": ""}

    def show(name: str, piece: str) -> None:
        read[name] += piece

    read_together(together, show)
    assert [answer.ids for answer in together.values()] == [alone, alone]
    assert read["a"] == read["b"] == tokenizer.decode(alone, skip_special_tokens=True)
    assert drawn(Draw(0.8, 6, 12, 0, (EOS,))) != alone


def test_ends_and_least_length_are_the_runs_own(model: AnsweringModel, tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, "A house")
    whole = model.answer(prompt, GREEDY)
    list(whole)
    third = whole.ids[2]
    first = whole.ids.index(third) + 1
    short = model.answer(prompt, Draw(0.0, 0, 12, 0, (EOS, third)))
    list(short)
    assert short.ids == whole.ids[:first]
    longer = model.answer(prompt, Draw(0.0, 0, 12, 6, (EOS, third)))
    list(longer)
    assert len(longer.ids) >= 6 and third not in longer.ids[:5]


def test_answers_stop_when_they_are_told(
    model: AnsweringModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes in the caller's thread, which shows; then all have stopped, and what they wrote is there.

    None writes more than 30 tokens before all are told, so none can have ended by itself.
    """
    told, both, noise, stop = [0], threading.Event(), GumbelNoise.__call__, Answer.stop
    prompt = encode_prompt(tokenizer, "A house")

    def waiting(self: GumbelNoise, input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] > len(prompt) + 30:
            assert both.wait(60)
        return noise(self, input_ids, scores)

    def counted(self: Answer) -> None:
        stop(self)
        told[0] += 1
        if told[0] == 2:
            both.set()

    def interrupted(name: str, piece: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GumbelNoise, "__call__", waiting)
    monkeypatch.setattr(Answer, "stop", counted)
    answers = {name: model.answer(prompt, Draw(1.0, 0, 800, 800, (EOS,))) for name in "ab"}
    with pytest.raises(KeyboardInterrupt):
        read_together(answers, interrupted)
    assert all(0 < len(answer.ids) < 40 for answer in answers.values())
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("answers")]


def test_an_error_of_the_model_comes_to_the_reader(model: AnsweringModel) -> None:
    answers = {"a": model.answer([3, 10**6], GREEDY)}  # no such token
    with pytest.raises(IndexError):
        read_together(answers, lambda name, piece: None)


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        (tldr_prompt("dogs", "My dog", "He ate it.").text, POST),
        ("\n\nHuman: Why?\n\nAssistant:", CHAT),
        ("15 or 24, the larger is", TEXT),
    ],
)
def test_the_template_is_that_of_the_runs_prompts(tokenizer: Any, prompt: str, template: str) -> None:
    assert template_of(tokenizer, [prompt, "another"]) == template
    assert template_of(tokenizer, []) == TEXT


def chatting(tokenizer: Any, directory: Path) -> Any:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    tokenizer.chat_template = None
    return load_tokenizer_only(directory)


def load_tokenizer_only(directory: Path) -> Any:
    from rayrlhf.models.hub import read_tokenizer

    return read_tokenizer(str(directory), None)


def test_what_is_typed_becomes_the_prompts_of_each_template(tokenizer: Any, tmp_path: Path) -> None:
    before = [Message("user", "Hi"), Message("assistant", "Hello")]

    def text(typist: Typist, typed: str) -> str:
        ids, cut = typist.prompt(typed, before if typist.template == CHAT else ())
        assert not cut
        return str(tokenizer.decode(ids[1:]))  # without the BOS

    head = "SUBREDDIT: r/AskReddit\n\nTITLE: "
    assert text(Typist(tokenizer, TEXT, 99), "The sum is") == "The sum is"
    assert text(Typist(tokenizer, POST, 99), "He ate it.") == f"{head}\n\nPOST: He ate it.\n\nTL;DR:"
    assert (
        text(Typist(tokenizer, POST, 99), "Dog\nHe ate it.\nAll.") == f"{head}Dog\n\nPOST: He ate it.\nAll.\n\nTL;DR:"
    )
    plain = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    assert text(Typist(tokenizer, CHAT, 99), "Why?") == plain
    assert text(Typist(tokenizer, CHAT, 99, "Be brief."), "Why?") == f"\n\nSystem: Be brief.{plain}"
    own = chatting(tokenizer, tmp_path)
    assert template_of(own, ["<user>Why?\n<assistant>"]) == template_of(own, []) == CHAT
    assert template_of(own, ["The sum is"]) == TEXT
    assert text(Typist(own, CHAT, 99), "Why?") == "<user>Hi\n<assistant>Hello\n<user>Why?\n<assistant>"


def test_a_long_dialogue_loses_its_oldest_turns_and_says_so(tokenizer: Any) -> None:
    said = [Message(role, f"number {i}") for i in range(20) for role in ("user", "assistant")]
    ids, cut = Typist(tokenizer, CHAT, 60).prompt("and now?", said)
    kept = tokenizer.decode(ids[1:])
    assert cut and len(ids) <= 60 and kept.endswith("number 19\n\nHuman: and now?\n\nAssistant:")
    assert "number 0" not in kept
    with pytest.raises(UserError, match="empty prompt"):
        Typist(tokenizer, CHAT, 60).prompt("  ")


@pytest.mark.parametrize("template", [CHAT, POST, TEXT])
def test_a_servers_chat_template_gives_the_same_prompt(tokenizer: Any, template: str) -> None:
    typist = Typist(tokenizer, template, 200)
    before = [Message("user", "Hi"), Message("assistant", "Hello")] if template == CHAT else []
    messages = [{"role": m.role, "content": m.content} for m in [*before, Message("user", "Tell me")]]
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=chat_template_of(tokenizer, template), tokenize=False, add_generation_prompt=True
    )
    # As vLLM does: the template has written the BOS.
    assert tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]) == typist.prompt("Tell me", before)[0]


def test_a_tokenizer_with_a_template_keeps_it(tokenizer: Any, tmp_path: Path) -> None:
    assert chat_template_of(chatting(tokenizer, tmp_path), CHAT) is None
