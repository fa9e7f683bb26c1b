"""Models to start from: where they are, which stage takes which, and whether they fit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import jobs.collect
from actors.training.loop import Loop
from actors.training.rl import RLArguments, load_models
from jobs.collect import collect
from jobs.reward_model import reward_model
from jobs.session import Session, opened
from jobs.stage import run as run_stages
from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, load_config, parse_config
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.roles import check_policy, check_reward_model
from rayrlhf.models.saving import save_model
from rayrlhf.rewards.labellers import Unranked
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.stages import STAGES, stages_of
from rayrlhf.runs.starts import Starts, find_model, find_models
from rayrlhf.runs.storage import Store
from tests.families import FAMILIES, TINY, write_model
from tests.s3 import KEYS, serving

ROOT = Path(__file__).parents[2]
GIVEN = {"comparisons": {"format": "tldr_comparisons", "path": "file.jsonl"}}
FUNCTION = [{"kind": "python", "name": "mine", "path": "mine.py:score"}]


def config(**sections: Any) -> Config:
    return parse_config({"name": "one", **sections}, "test")


def begins(model: str) -> dict[str, str]:
    return {"from": model}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with run `a`, which has finished `sft` and `reward_model`."""
    run = open_or_create(config(name="a"), tmp_path)
    for stage in ("sft", "reward_model"):
        with run.writing(stage) as directory:
            for name in ("config.json", "tokenizer.json"):
                (directory / name).write_text("{}")
            save_file({"weight": np.zeros(1, np.float32)}, directory / "model.safetensors")
    return tmp_path


# ---- the config


@pytest.mark.parametrize(
    "sections",
    [
        {"stages": ["rl", "evaluate"], "rl": begins("m"), "rewards": FUNCTION},
        {"stages": ["rl", "evaluate"], "rl": begins("m"), "reward_model": begins("r")},
        {"stages": ["rl"], "sft": begins("m"), "reward_model": begins("r")},
        {"stages": ["reward_model", "rl"], "sft": begins("m"), "data": GIVEN},
        {"stages": ["reward_model"], "reward_model": begins("m"), "data": GIVEN},
        {"stages": ["collect", "reward_model", "rl", "evaluate"], "sft": begins("m")},
        {"stages": ["dpo", "evaluate"], "dpo": begins("m"), "data": GIVEN},
        {"stages": ["collect", "dpo"], "sft": begins("m")},
        {"stages": ["dpo", "rl"], "dpo": begins("m"), "data": GIVEN, "rewards": FUNCTION},
        {"rl": begins("m"), "sft": begins("n")},
    ],
)
def test_a_stage_has_its_input_from_an_earlier_stage_or_from_a_model(sections: dict[str, Any]) -> None:
    found = config(**sections)
    assert sections.get("stages", [stage.name for stage in stages_of(found)]) == [s.name for s in stages_of(found)]
    assert parse_config(dump_config(found), "dumped") == found  # the key is `from` there, too


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"stages": ["rl"], "rewards": FUNCTION},
            "sft is missing; rl starts from its model, from sft.from, or from rl",
        ),
        ({"stages": ["dpo"], "data": GIVEN}, "sft is missing; dpo starts from its model, from sft.from, or from dpo"),
        ({"stages": ["reward_model"], "data": GIVEN}, "sft is missing; reward_model starts from its model"),
        ({"stages": ["collect", "rl"], "rl": begins("m")}, "sft is missing; collect samples from its model"),
        ({"stages": ["rl"], "rl": begins("m")}, "rl needs reward_model, reward_model.from, or rewards"),
        ({"stages": ["dpo"], "dpo": begins("m")}, "dpo needs collect, or data.comparisons"),
        ({"reward_model": begins("m"), "rewards": FUNCTION}, "reward_model.from: no reward has the kind model"),
        ({"rl": {"value_from": "reward_model"}, "rewards": FUNCTION}, "rl.value_from: the run has no reward model"),
        ({"rl": {"algorithm": "grpo", "value_from": "policy"}}, "unknown key 'rl.value_from'"),
        ({"sft": {"start": "m"}}, "unknown key 'sft.start'"),
        ({"collect": begins("m")}, "unknown key 'collect.from'"),
        ({"rl": {"form": "m"}}, "did you mean 'from'?"),
    ],
)
def test_what_has_nothing_to_start_from_is_one_line(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        config(**sections)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_line_takes_a_start() -> None:
    overrides = ["stages=[rl, evaluate]", "rl.from=runs/a/sft", "reward_model.from=runs/a", "rl.value_from=policy"]
    found = load_config(ROOT / "configs/quickstart.yaml", [*overrides, "from=runs/b"])
    assert (found.start, found.rl.start, found.reward_model.start) == ("runs/b", "runs/a/sft", "runs/a")
    assert [reward.name for reward in found.scored_by] == ["reward_model"] and not found.trains_reward_model


# ---- where a model is


def test_a_run_stands_for_the_model_that_its_stage_of_the_same_name_has_made(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert find_model("a", "sft", "sft.from") == f"{runs}/a/sft"
    assert find_model(str(runs / "a"), "reward_model", "reward_model.from") == f"{runs}/a/reward_model"
    assert find_model(TINY, "rl", "rl.from") == TINY == find_model("embedded:opt-tiny", "rl", "rl.from")
    assert find_model("org/name", "rl", "rl.from") == "org/name"
    for given, said in (
        ("a", "rl.from: run a has no finished stage 'rl'; it has made: a/sft, a/reward_model"),
        ("./none", "rl.from: model './none': no such directory, and not a hub name"),
        ("a", "rl.from: run a has no finished stage"),
    ):
        with pytest.raises(UserError) as raised:
            find_model(given, "rl", "rl.from")
        assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_a_model_of_a_store_is_one_whose_upload_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "RAYRLHF_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    Store.open.cache_clear()
    with serving() as s3:
        run = open_or_create(config(name="a"), s3.uri("runs"))
        with run.writing("sft") as directory:
            (directory / "config.json").write_text("{}")
        there = s3.uri("runs/a/sft")
        assert find_model(run.address, "sft", "sft.from") == there == find_model(there, "rl", "rl.from")
        with pytest.raises(UserError, match=r"rl\.from: .*runs/a/policy.*no such model, or its upload"):
            find_model(s3.uri("runs/a/policy"), "rl", "rl.from")


def starts(runs: Path, **sections: Any) -> Starts:
    own = config(name="b", **sections)
    return Starts(own, RunFolder(runs / "b"), find_models(own))


def test_each_stage_takes_what_comes_before_it_or_what_it_is_given(runs: Path) -> None:
    own, a = f"{runs}/b", f"{runs}/a"
    found = starts(runs)
    assert [found.of(stage) for stage in ("sft", "collect", "reward_model", "rl")] == [TINY, *[f"{own}/sft"] * 3]
    assert (found.base, found.baseline, found.final_policy) == (TINY, f"{own}/sft", f"{own}/policy")
    assert found.reward_model == found.value_model == f"{own}/reward_model"
    # As before: `rl` follows `dpo`, and a run without a reward model has a value model from its policy.
    found = starts(runs, stages=["sft", "dpo", "rl"], data=GIVEN, rewards=FUNCTION)
    assert (found.of("rl"), found.reward_model, found.value_model) == (f"{own}/dpo", None, f"{own}/dpo")
    # What a stage is given takes the place of what comes before it, for this stage.
    found = starts(runs, sft=begins("org/base"), rl=begins(f"{a}/sft"), reward_model=begins(a))
    assert (found.base, found.baseline) == ("org/base", f"{own}/sft")
    assert [found.of(stage) for stage in ("collect", "reward_model", "rl")] == [
        f"{own}/sft", f"{a}/reward_model", f"{a}/sft",
    ]  # fmt: skip
    assert found.reward_model == f"{own}/reward_model"
    # A stage that is left out hands on what it is given.
    found = starts(runs, stages=["rl", "evaluate"], sft=begins(a), reward_model=begins(a))
    assert (found.base, found.baseline, found.of("rl")) == (f"{a}/sft",) * 3
    assert found.reward_model == found.value_model == f"{a}/reward_model"
    # Without it, the first policy is the one that others are compared with.
    found = starts(runs, stages=["rl", "evaluate"], rl={"from": TINY, "value_from": "policy"}, rewards=FUNCTION)
    assert (found.base, found.baseline, found.value_model) == (TINY,) * 3
    found = starts(runs, rl={"value_from": a})
    assert found.value_model == f"{a}/reward_model" and found.reward_model == f"{own}/reward_model"
    # What no stage of the run would read is not looked for.
    assert find_models(config(stages=["sft"], rl=begins("./none"), dpo=begins("./none"))) == {}


def test_a_stage_that_is_given_a_model_needs_no_earlier_one() -> None:
    def inputs(stage: str, **sections: Any) -> list[str]:
        return [each.name for each in STAGES[stage].inputs(config(**sections))]

    assert inputs("rl") == ["sft", "reward_model"] and inputs("rl", rl=begins("m")) == ["reward_model"]
    assert inputs("reward_model") == ["sft", "collect"]
    assert inputs("reward_model", reward_model=begins("m")) == ["collect"]
    everything = list(STAGES)
    assert inputs("rl", stages=everything) == ["dpo", "reward_model"]
    assert inputs("evaluate", stages=everything) == ["sft", "reward_model", "dpo", "rl"]
    assert inputs("rl", stages=["rl"], sft=begins("m"), reward_model=begins("r")) == []


# ---- whether models fit together


def with_token(directory: Path, token: str) -> Path:
    """The tiny model with one more token in its tokenizer."""
    model, tokenizer = load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY)
    tokenizer.add_tokens([token])
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, directory)
    return directory


def test_models_that_do_not_fit_are_one_line_with_the_key(tmp_path: Path) -> None:
    llama = str(write_model(FAMILIES["llama"], tmp_path / "llama"))
    neighbour = str(write_model(FAMILIES["mistral"], tmp_path / "mistral"))
    labels = write_model(FAMILIES["llama"], tmp_path / "labels", auto=AutoModelForSequenceClassification)
    other = str(with_token(tmp_path / "other", "zebra-crossing"))
    score = tmp_path / "score"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), score)

    check_policy(TINY, TINY)
    check_reward_model(str(score), TINY, trained=False)
    check_reward_model(TINY, TINY, trained=True)
    checks: tuple[tuple[Callable[[], None], str], ...] = (
        (lambda: check_policy(str(score), TINY), "is a reward model (OPTForSequenceClassification)"),
        (lambda: check_policy(neighbour, llama), "has model_type mistral and"),
        (lambda: check_policy(llama, TINY), "; all policies of a run have one tokenizer"),
        (lambda: check_reward_model(TINY, TINY, trained=False), "is no reward model (OPTForCausalLM has no"),
        (lambda: check_reward_model(str(labels), llama, trained=True), "has a head of 2 labels"),
        (lambda: check_reward_model(other, TINY, trained=False), "'zebra-crossing'): .* ; a model with a token"),
        (
            lambda: check_reward_model(other, TINY, trained=True),
            "set this key to null to begin with a model of the run's own",
        ),
        (lambda: check_reward_model(other, TINY, trained=False), f"[{{kind: model, path: {other}}}]"),
    )
    for check, said in checks:
        with pytest.raises(UserError) as raised:
            check()
        text = str(raised.value)
        assert "\n" not in text
        assert all(part in text for part in said.split(" .* ")), text


def rows(directory: Path, name: str = "posts.jsonl") -> Path:
    path = directory / name
    posts = [{"prompt": f"What is {i}?", "response": f"It is the number {i}."} for i in range(40)]
    path.write_text("".join(json.dumps(post) + "\n" for post in posts))
    return path


def tree(directory: Path, **sections: Any) -> Config:
    data = {"demonstrations": {"format": "prompts", "path": str(rows(directory))}, "max_response_tokens": 8}
    return config(name="b", runs_dir=str(directory / "runs"), **{"data": data, **sections})


def test_a_session_begins_with_the_model_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer is that model's, and a reward model that reads other ids is refused before anything starts."""
    other = tmp_path / "model"
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens(["zebra-crossing"])
    policy = load_policy(TINY)
    policy.resize_token_embeddings(len(tokenizer))
    save_model(policy, tokenizer, other)
    sections: dict[str, Any] = {"stages": ["rl", "evaluate"], "rl": begins(str(other))}
    with opened(tree(tmp_path, **sections, rewards=[length(tmp_path)]), local=True) as session:
        assert session.model == str(other) == session.config.model.path
        assert "zebra-crossing" in session.tokenizer.get_vocab()
        session.start()
        stored = RunFolder(session.run.path).config.read_text()
    assert "path: embedded:opt-tiny" in stored and f"from: {other}" in stored  # as the user wrote it
    out = " ".join(capsys.readouterr().out.split())
    share = len(session.data.train.sft)
    assert f"{share} demonstrations are the share of sft, which this run leaves out" in out and share > 0
    score = tmp_path / "score"
    save_model(load_reward_model(TINY, fresh_head_seed=0), load_tokenizer(TINY), score)
    refused = tree(tmp_path, **sections, reward_model=begins(str(score))).model_copy(update={"name": "c"})
    with opened(refused, local=True) as session, pytest.raises(UserError, match=r"^reward_model\.from: .*zebra"):
        session.start()


def length(directory: Path) -> dict[str, str]:
    """A reward in a file under `directory`."""
    script = directory / "length.py"
    script.write_text("def length(responses):\n    return [float(len(text)) for text in responses]\n")
    return {"kind": "python", "name": "length", "path": f"{script}:length"}


def test_a_reward_model_trains_on_from_the_one_that_is_given(tmp_path: Path) -> None:
    """At a learning rate below what float32 resolves, it is the given one, head and all."""
    given = load_reward_model(TINY, fresh_head_seed=7)
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.mul_(1.5)
    save_model(given, load_tokenizer(TINY), tmp_path / "given")
    pairs = tmp_path / "pairs.jsonl"
    answers = {"chosen": "it is a very good drink", "rejected": "it is no drink at all"}
    pairs.write_text("".join(json.dumps({"prompt": f"What is {i}?", **answers}) + "\n" for i in range(20)))
    data = {
        "demonstrations": {"format": "prompts", "path": str(rows(tmp_path))}, "max_response_tokens": 8,
        "comparisons": {"format": "prompts", "path": str(pairs)},
    }  # fmt: skip
    settings = {"optimizer": {"lr": 1e-30}, "from": str(tmp_path / "given")}
    own = tree(tmp_path, stages=["reward_model"], data=data, reward_model=settings)
    run_stages(own, [reward_model], local=True)
    trained = load_file(tmp_path / "runs/b/reward_model/model.safetensors")
    expected = load_file(tmp_path / "given/model.safetensors")
    assert set(trained) == set(expected) and "score.weight" in trained
    for name, value in trained.items():
        assert torch.equal(value, expected[name]), name
    # The run has no SFT model whose log-probs could order the held-out pairs.
    accuracy = json.loads((tmp_path / "runs/b/reward_model.json").read_text())["accuracy"]
    assert list(accuracy) == ["reward_model", "longer", "shorter"]


def test_the_value_model_starts_as_what_it_is_given(tmp_path: Path) -> None:
    """A language model gets a new head, a model with a head keeps it."""
    score = tmp_path / "score"
    save_model(load_reward_model(TINY, fresh_head_seed=7), load_tokenizer(TINY), score)
    heads = {}
    for name, value_model in (("policy", TINY), ("given", str(score))):
        own = config(name=name, runs_dir=str(tmp_path), rl={"value_from": "policy" if name == "policy" else str(score)})
        arguments = RLArguments(own, str(tmp_path / name), "rl", 1, TINY, value_model, coordinator=None)  # type: ignore[arg-type]
        with Loop("rl", arguments) as loop:
            policy, found = load_models(loop, arguments, None)
        assert found is not None
        heads[name] = found.score.weight.detach()
        assert torch.equal(policy.get_input_embeddings().weight, found.get_input_embeddings().weight)
    assert torch.equal(heads["given"], load_file(score / "model.safetensors")["score.weight"])
    assert not torch.equal(heads["policy"], heads["given"])


# ---- a stage with nothing is not done


def test_collect_with_ties_only_is_an_error_and_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer shares as many words with the reference: none."""

    def sampled(session: Session, records: Any) -> Any:
        answers, ids = ("one two three four five", "six seven eight nine ten"), ((1,), (2,))
        return [Unranked(record.id, record.prompt, answers, (5,), ids) for record in records], {}

    monkeypatch.setattr(jobs.collect, "sample_answers", sampled)
    with opened(tree(tmp_path), local=True) as session:
        session.run.sft.mkdir()
        with pytest.raises(
            UserError, match=r"collect: nothing to learn from: 'reference' ranked all answers"
        ) as raised:
            collect(session)
        assert "\n" not in str(raised.value) and not session.run.done("collect")
