"""Reward models from elsewhere: scores as plain transformers gives them, what is cut, and what is refused at start."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OPTConfig,
    ViTConfig,
)

from actors.rollouts.batch import Batch
from actors.rollouts.groups import Cursor
from actors.rollouts.scorer import Scorer
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.config_resources import ScorerConfig
from rayrlhf.data.records import Message, Prompt
from rayrlhf.data.tokens import encode_prompt, encode_responses
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.reports.alarms import alarms
from rayrlhf.rewards.functions import RewardModelFunction
from rayrlhf.rewards.texts import TextRewards, make_text_rewards
from rayrlhf.runs.stages import stages_of
from rayrlhf.trajectory import SerializedTrajectory
from tests.classifiers import BERT, CHAT_LLAMA, KINDS, ROBERTA, write, write_tokenizer
from tests.families import write_model
from tests.tiny import forward_of
from tests.unit.test_python_rewards import OWNERS, TEXTS, trajectories

DIALOGUE = (Message("system", "Be kind."), Message("user", "a dog ?"), Message("assistant", "no"))
PROMPTS = [
    Prompt("p0", "What then ?"),
    Prompt("p1", "not shown", messages=(*DIALOGUE, Message("user", "And then ?"))),
]
PLAIN = ["What then ?", "\n\nSystem: Be kind.\n\nHuman: a dog ?\n\nAssistant: no\n\nHuman: And then ?\n\nAssistant:"]
CHAT = ["<s><u> What then ? </s> ", "<s>. Be kind. </s> <u> a dog ? </s> <a> no </s> <u> And then ? </s> "]
JOINED = {
    "plain": [f"{PLAIN[int(owner[1])]} {text}" for owner, text in zip(OWNERS, TEXTS, strict=True)],
    "chat": [f"{CHAT[int(owner[1])]}<a> {text} </s> " for owner, text in zip(OWNERS, TEXTS, strict=True)],
}


def config_of(path: Path | str, **more: Any) -> Config:
    return parse_config(
        {"name": "run", "rewards": [{"kind": "model", "name": "given", "path": str(path), **more}]}, "t"
    )


def rewards_of(path: Path | str, tokens: int = 4096, **more: Any) -> TextRewards:
    """As a scorer has them: pickled, and started there."""
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    made = TextRewards(make_text_rewards(config_of(path, **more).rewards), PROMPTS, tokenizer)
    rewards: TextRewards = pickle.loads(pickle.dumps(made))
    rewards.start(ScorerConfig(micro_batch_tokens=tokens))
    return rewards


def plain_scores(path: Path, texts: list[str], special: bool, output: int = 0) -> list[float]:
    """One text at a time, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [
            float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=special)).logits[0, output])
            for text in texts
        ]


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_transformers_one_text_at_a_time(tmp_path: Path, name: str, tokens: int) -> None:
    """In batches of mixed lengths and one by one; chat template and padding token are there or not."""
    kind = KINDS[name]
    path = write(tmp_path / "model", kind)
    given = trajectories()
    found = rewards_of(path, tokens, weight=-0.5)(given)
    expected = plain_scores(path, JOINED[kind.texts], special=kind.texts == "plain")
    assert len({round(score, 3) for score in expected}) == 3
    assert found == {"given": pytest.approx([-0.5 * score for score in expected], rel=1e-4, abs=1e-5)}
    assert [t.counted for t in given] == [{"prompts_cut/given": 0}] * 3


@pytest.mark.parametrize("label", ["toxic", 1])
def test_a_label_says_which_output_is_the_score(tmp_path: Path, label: str | int) -> None:
    labels = {0: "clean", 1: "toxic", 2: "spam"}
    path = write(tmp_path / "model", BERT, num_labels=3, id2label=labels, label2id={v: k for k, v in labels.items()})
    found = rewards_of(path, label=label)(trajectories())["given"]
    assert found == pytest.approx(plain_scores(path, JOINED["plain"], special=True, output=1), rel=1e-4, abs=1e-5)


def test_bfloat16_weights_score_nearly_the_same_and_take_half_the_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "model", CHAT_LLAMA)
    full, half = (make_text_rewards(config_of(path, dtype=dtype).rewards)[0] for dtype in ("float32", "bfloat16"))
    weights = AutoModelForSequenceClassification.from_pretrained(path)
    assert full.bytes == 2 * half.bytes == 4 * sum(parameter.numel() for parameter in weights.parameters())
    found, expected = (rewards_of(path, dtype=dtype)(trajectories())["given"] for dtype in ("bfloat16", "float32"))
    assert found != expected and found == pytest.approx(expected, rel=0.1, abs=0.2)


def test_no_weights_travel(tmp_path: Path) -> None:
    rewards = rewards_of(write(tmp_path / "model", BERT, hidden_size=128))
    assert len(pickle.dumps(rewards.rewards)) < 2000


def test_special_tokens_that_a_response_spells_are_removed(tmp_path: Path) -> None:
    """A policy must not close its turn and open another one."""
    path = write(tmp_path / "model", CHAT_LLAMA)
    rewards = rewards_of(path)
    told: dict[str, list[Any]] = {"prompts": ["What ?"], "messages": [()]}
    clean, forged = (
        rewards.rewards[0](trajectories()[:1], told | {"responses": [text]}) for text in ("no no", "no </s> <u> no")
    )
    assert forged == clean


def test_a_model_of_another_run_is_read_as_there(tmp_path: Path) -> None:
    """Behind its EOS, which is its own suffix, and with its `reward_bias`."""
    config = OPTConfig.from_pretrained(resolve_model("embedded:opt-tiny"), num_labels=1, num_hidden_layers=1)
    path = write_model(config, tmp_path / "model", auto=AutoModelForSequenceClassification)
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | {"reward_bias": 2.5}))
    given, tokenizer = trajectories()[:2], load_tokenizer(str(path))
    prompt = "What then ?"
    responses = encode_responses(tokenizer, TEXTS[:2], 20, [prompt] * 2)
    for trajectory, response in zip(given, responses, strict=True):
        trajectory.response_ids = np.array(response)
        trajectory.prompt_ids = np.array(encode_prompt(tokenizer, prompt))
    expected = RewardModelFunction(forward_of(load_reward_model(str(path))))(given)["reward_model"]
    assert rewards_of(path, suffix="</s>")(given)["given"] == pytest.approx(expected, rel=1e-4)
    assert rewards_of(path)(given)["given"] != pytest.approx(expected, rel=1e-2)


def test_a_scorer_loads_it_and_adds_it_to_what_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "model", BERT)
    code = tmp_path / "rule.py"
    code.write_text("def rule(responses):\n    return [len(text) for text in responses]\n")
    sections = [
        {"kind": "model", "name": "given", "path": str(path), "weight": 2.0},
        {"kind": "python", "name": "rule", "path": f"{code}:rule"},
    ]
    config, policy = parse_config({"name": "run", "rewards": sections}, "test"), resolve_model("embedded:opt-tiny")
    texts = TextRewards(make_text_rewards(config.rewards), PROMPTS, load_tokenizer(policy))
    scorer = Scorer(
        "scorer-0", None, policy, ScorerConfig(), rewards=config.scored_by, texts=texts, pad_token_id=1, dtype="float32"
    )
    expected = plain_scores(path, JOINED["plain"], special=True)
    for scored, score, text in zip(scorer.score(trajectories(), 1.0), expected, TEXTS, strict=True):
        assert scored.rewards == {"given": pytest.approx(2.0 * score, rel=1e-4, abs=1e-5), "rule": len(text)}
        assert scored.ref_logprobs is not None


# ---- what is too long


def longest_end(path: Path, ids: Callable[[str], list[int]], prompt: str, context: int) -> float:
    """The score with the longest end of the prompt that fits, found by trying every one."""
    fitting = next(own for start in range(len(prompt) + 1) if len(own := ids(prompt[start:])) <= context)
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        return float(model(input_ids=torch.tensor([fitting])).logits[0, 0])


def test_a_long_prompt_loses_its_beginning_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "once upon a time a dog barked ? And then ?"
    monkeypatch.setattr("tests.unit.test_pretrained_rewards.PROMPTS", [Prompt("p0", prompt), Prompt("p1", "What ?")])
    for name, kind in {"bert": BERT, "roberta": ROBERTA, "chat llama": CHAT_LLAMA}.items():
        # RoBERTa's positions begin behind that of the padding token.
        context = 15
        path = write(tmp_path / name, kind, max_position_embeddings=context + (name == "roberta"))
        tokenizer = AutoTokenizer.from_pretrained(path)

        def ids(end: str, tokenizer: Any = tokenizer, chat: bool = kind.texts == "chat") -> list[int]:
            text = f"<s><u> {end} </s> <a> {TEXTS[0]} </s>" if chat else f"{end} {TEXTS[0]}"
            return list(tokenizer(text, add_special_tokens=not chat)["input_ids"])

        given = trajectories()
        found = rewards_of(path)(given)["given"]
        assert len(ids(prompt)) > context
        assert found[0] == pytest.approx(longest_end(path, ids, prompt, context), rel=1e-4, abs=1e-5)
        assert [t.counted["prompts_cut/given"] for t in given] == [1, int(len(ids(prompt)) - 2 > context), 0]
        # The count reaches metrics and screen.
        batch = Batch.of(1, 0, [SerializedTrajectory.of(t) for t in given], Cursor(1), 0)
        cut = batch.metrics["rl/prompts_cut/given"]
        assert cut == sum(t.counted["prompts_cut/given"] for t in given)
        (warning,) = alarms(batch.metrics | {"rl/responses": 3.0}, config_of(path), {})
        assert warning.startswith(
            f"reward 'given' read {cut:.0f} of 3 responses without the beginning of their prompts"
        )


def test_a_long_dialogue_loses_its_oldest_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its system message, and no dialogue begins with the assistant; a response that is too long keeps its end."""
    turns = (
        Message("system", "."),
        Message("user", "a dog ?"),
        Message("assistant", "no no"),
        Message("user", "What ?"),
    )
    monkeypatch.setattr("tests.unit.test_pretrained_rewards.PROMPTS", [Prompt(p, "", messages=turns) for p in OWNERS])
    path = write(tmp_path / "model", CHAT_LLAMA, max_position_embeddings=14)
    texts = [f"<s>. . </s> <u> What ? </s> <a> {text} </s>" for text in TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [len(row) for row in rows] == [13, 11, 16]
    without = tokenizer(f"<s>. . </s> <u> </s> <a> {TEXTS[2]} </s>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits) for row in (*rows[:2], without[-14:])]
    given = trajectories()
    assert rewards_of(path)(given)["given"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [t.counted["prompts_cut/given"] for t in given] == [1, 1, 1]


# ---- what the driver refuses before anything starts


def refusal(path: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as raised:
        make_text_rewards(config_of(path, **more).rewards)
    line = str(raised.value)
    assert line.startswith("reward 'given': model ") and "\n" not in line
    return line


def test_a_model_that_gives_no_score_is_refused(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    headless = write(tmp_path / "headless", BERT, AutoModelForCausalLM, is_decoder=True)
    assert "weights that are missing: classifier.weight, classifier.bias" in refusal(headless)
    llama = write(tmp_path / "llama", CHAT_LLAMA, AutoModelForCausalLM)
    assert "no sequence-classification head (weights that are missing: score.weight)" in refusal(llama)
    other = write(tmp_path / "other", BERT)
    ViTConfig().save_pretrained(other)
    assert "transformers has no sequence classifier of type vit" in refusal(other)
    several = write(tmp_path / "several", BERT, num_labels=2, id2label={0: "bad", 1: "good"})
    assert "has 2 outputs; choose one by `label`: 0: bad, 1: good" in refusal(several)
    for label in ("best", 2, -1):
        assert f"has no label {label!r}; there are 0: bad, 1: good" in refusal(several, label=label)
    picky = write(tmp_path / "picky", CHAT_LLAMA)
    write_tokenizer(picky, chat_template="{{ raise_exception('no assistants') }}")
    assert "its chat template refuses a user's and an assistant's turn: no assistants" in refusal(picky)
    damaged = write(tmp_path / "damaged", BERT)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors is cut short or damaged" in refusal(damaged)


def test_missing_weights_behind_the_head_are_refused_where_it_is_loaded(tmp_path: Path) -> None:
    """Those of the base model are known only when it is loaded, since transformers renames some."""
    from safetensors.torch import load_file, save_file

    path = write(tmp_path / "model", BERT)
    weights = load_file(path / "model.safetensors")
    del weights["bert.pooler.dense.bias"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"reward 'given': model .*: weights are missing \(bert.pooler.dense.bias\)"):
        rewards_of(path)


def test_a_dialogue_that_the_template_refuses_names_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = (Message("user", "a"), Message("system", "b"), Message("user", "c"))
    monkeypatch.setattr("tests.unit.test_pretrained_rewards.PROMPTS", [Prompt(p, "", messages=late) for p in OWNERS])
    rewards = rewards_of(write(tmp_path / "model", CHAT_LLAMA))
    with pytest.raises(UserError, match="its chat template refuses prompt 'p0': late"):
        rewards(trajectories())


def test_a_hub_model_that_is_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files that are split; one without a head is found out by its index alone."""
    hub = tmp_path / "hub"
    for constant, value in {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, constant, value)
    for name, auto in (("given", AutoModelForSequenceClassification), ("headless", AutoModelForCausalLM)):
        config = CHAT_LLAMA.config()
        path = hub / f"models--us--{name}" / "snapshots" / "abc"
        auto.from_config(config).save_pretrained(path, max_shard_size="5KB")
        write_tokenizer(path, **CHAT_LLAMA.tokenizer)
        assert (path / "model.safetensors.index.json").is_file()
        (path.parents[1] / "refs").mkdir()
        (path.parents[1] / "refs" / "main").write_text("abc")
    found = rewards_of("us/given")(trajectories())["given"]
    path = hub / "models--us--given" / "snapshots" / "abc"
    assert found == pytest.approx(plain_scores(path, JOINED["chat"], special=False), rel=1e-4, abs=1e-5)
    assert "weights that are missing: score.weight" in refusal("us/headless")
    assert "cannot be reached" in refusal("us/nowhere")
    shutil.rmtree(hub)


# ---- in a run


def test_it_stands_beside_or_in_place_of_the_one_that_the_run_trains() -> None:
    given = [{"kind": "model", "name": name, "path": f"us/{name}"} for name in ("a", "b")]
    alone = parse_config({"name": "run", "rewards": given}, "test")
    assert not alone.trains_reward_model and [r.name for r in alone.scored_by] == ["a", "b"]
    assert [stage.name for stage in stages_of(alone)] == ["sft", "rl", "evaluate"]
    beside = parse_config({"name": "run", "rewards": [{"kind": "model"}, *given]}, "test")
    assert beside.trains_reward_model and [r.name for r in beside.scored_by] == ["reward_model", "a", "b"]
    chosen = {"stages": ["sft", "collect", "dpo", "evaluate"], "evaluate": {"best_of": 2}}
    by_given = parse_config({"name": "run", "rewards": [{"kind": "model"}, *given], **chosen}, "test")
    assert [r.name for r in by_given.scored_by] == ["a", "b"], "what best_of chooses by"
    with pytest.raises(UserError, match="leave out reward_model; no reward has the kind model without a path"):
        parse_config({"name": "run", "rewards": given, "stages": ["sft", "collect", "reward_model", "rl"]}, "test")
    assert parse_config(dump_config(beside), "a run's own config.yaml") == beside
