"""What a session reads and says, and what it hands from one stage to the next."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.pools.remote import namespace
from jobs.reward_model import reward_model
from jobs.session import opened
from rayrlhf.config import Config
from rayrlhf.config_data import DatasetConfig
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.reports.overview import read_overview

LENGTHS = {"max_prompt_tokens": 160, "max_response_tokens": 8}
SAME = "the first words of both of these two answers are equal and many "


def config(directory: Path, **settings: Any) -> Config:
    """Demonstrations, and comparisons of which two are usable, in files under `directory`."""
    pairs = [(f"What is {i}?", "it is a good drink", "it is no drink, no") for i in "ab"]
    pairs += [("Why is it?", SAME + "yes", SAME + "no"), ("Who is it?", "it is too short", "it is not short at all")]
    for name in ("train", "validation"):
        ids = [f"{name}{i}" for i in range(40)]
        comparisons = [
            {"id": id, "prompt": f"{name}: {prompt}", "chosen": chosen, "rejected": rejected}
            for id, (prompt, chosen, rejected) in zip(ids, pairs, strict=False)
        ]
        demonstrations = [{"id": id, "prompt": f"What is {id}?", "response": f"It is {id}."} for id in ids]
        for kind, rows in (("comparisons", comparisons), ("demonstrations", demonstrations)):
            (directory / kind).mkdir(exist_ok=True)
            (directory / kind / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {kind: {"format": "prompts", "path": str(directory / kind)} for kind in ("comparisons", "demonstrations")}
    tree = {"name": "run", "runs_dir": str(directory / "runs"), "data": {**data, **LENGTHS}}
    return parse_config(tree | settings, "test")


def test_users_with_the_same_relative_runs_dir_have_namespaces_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one cluster, for runs of the same name; `rayrlhf status` finds the run's own by its config.yaml."""
    seen = []
    for user in ("first", "second"):
        (tmp_path / user).mkdir()
        monkeypatch.chdir(tmp_path / user)
        with opened(config(tmp_path, runs_dir="runs"), local=True) as session:
            folder = session.run.path
            assert folder == tmp_path / user / "runs" / "run"
            seen.append(namespace(session.config))
        monkeypatch.chdir(tmp_path)
        assert namespace(read_overview(folder).config) == seen[-1]
    assert seen[0] != seen[1]


def test_published_comparisons_count_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also pairs that differ only behind `max_response_tokens`, where both answers are cut."""
    with opened(config(tmp_path), local=True) as session:
        found = session.data.comparisons
    assert [r.id for r in found if not r.heldout] == ["train0", "train1"]
    expected = f"comparisons from {tmp_path}/comparisons; dropped: 1 equal_when_cut, 1 nearly_empty"
    expected += "; 2 responses cut to data.max_response_tokens=8"
    assert capsys.readouterr().out.splitlines()[0] == f"2 train {expected}"


def labelled(directory: Path, labels: str, split: str = "train") -> None:
    """A file with an answer for each of `labels`, `g` or `b`, two of them to each prompt."""
    rows = [
        {"prompt": f"What is {split}{i // 2}?", "completion": f"It is {i}.", "label": label == "g"}
        for i, label in enumerate(labels)
    ]
    (directory / "labelled").mkdir(exist_ok=True)
    (directory / "labelled" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def unpaired(directory: Path, **settings: Any) -> Config:
    own = config(directory, **settings)
    source = DatasetConfig(format="unpaired", path=str(directory / "labelled"))
    return own.model_copy(update={"data": own.data.model_copy(update={"comparisons": (source,)})})


WITHOUT_PAIRS = {"stages": ["sft", "dpo", "evaluate"], "dpo": {"loss": "kto", "max_comparisons": 3}}


def test_labelled_answers_are_counted_and_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(tmp_path, "gggggbgbb")
    labelled(tmp_path, "gb", "validation")
    with opened(unpaired(tmp_path, **WITHOUT_PAIRS), local=True) as session:
        found = session.data.comparisons
        table = session.overview()
    assert [(c.examples, c.heldout) for c in found] == [(2, False)] * 4 + [(1, False), (2, True)]
    path = tmp_path / "labelled"
    assert capsys.readouterr().out.splitlines() == [
        f"5 train prompts with 6 good and 3 bad answers from {path}; dropped: none",
        f"1 valid prompts with 1 good and 1 bad answers from {path}; dropped: none",
        # Of the three prompts that are trained on.
        "dpo: 5 good answers of weight 1 and 1 bad ones of weight 1 are 5 to 1; the authors of KTO advise 1 to 4/3: "
        "set dpo.undesirable_weight between 3.75 and 5",
        *(f"40 {split} demonstrations from {tmp_path}/demonstrations; dropped: none" for split in ("train", "valid")),
    ]
    cells = {column.header: [*column.cells] for column in table.columns}
    row = cells["stage"].index("dpo")
    assert [cells[name][row] for name in ("records", "samples\na step")] == ["3", "6"]  # 3 prompts of 9 / 5 answers


def test_labelled_answers_are_refused_where_pairs_are_needed(tmp_path: Path) -> None:
    """Before any stage starts."""
    for split in ("train", "validation"):
        labelled(tmp_path, "gb", split)
    for settings, said in (
        ({}, "the reward model learns from pairs; .* stages=.sft, dpo, evaluate. with dpo.loss=kto"),
        ({"stages": ["sft", "dpo"]}, "dpo.loss=dpo learns from pairs; set dpo.loss=kto"),
        ({"stages": ["sft", "dpo"], "dpo": {"loss": "simpo"}}, "dpo.loss=simpo learns from pairs"),
    ):
        with opened(unpaired(tmp_path, name=f"run{len(said)}", **settings), local=True) as session:
            with pytest.raises(UserError, match=f"format 'unpaired' has single answers .*{said}") as raised:
                session.start()
            assert "\n" not in str(raised.value)


def test_answers_that_are_all_good_and_bad_are_refused(tmp_path: Path) -> None:
    labelled(tmp_path, "gb")
    labelled(tmp_path, "gb", "validation")
    file = tmp_path / "labelled" / "train.jsonl"
    file.write_text(file.read_text().replace("It is 1.", "It is 0."))
    said = "all answers of split 'train' are called good by one row and bad by another"
    with opened(unpaired(tmp_path, **WITHOUT_PAIRS), local=True) as session, pytest.raises(UserError, match=said):
        session.start()


def test_the_reward_model_starts_from_the_sft_model(tmp_path: Path) -> None:
    """At a learning rate below what float32 resolves, all but its head is the run's `sft/`."""
    settings = {"optimizer": {"lr": 1e-30}, "prompts_per_batch": 2}
    path = resolve_model("embedded:opt-tiny")
    sft = load_policy(path)
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter.mul_(1.5)
    with opened(config(tmp_path, reward_model=settings), local=True) as session:
        with session.run.writing("sft") as directory:
            save_model(sft, load_tokenizer(path), directory)
        reward_model(session)
        trained = load_file(session.run.reward_model / "model.safetensors")
    found = {name.removeprefix("model."): value for name, value in trained.items() if not name.startswith("score.")}
    expected = {name.removeprefix("model."): value for name, value in sft.named_parameters()}
    assert set(found) <= set(expected) and len(found) > 10
    for name, value in found.items():
        assert torch.equal(value, expected[name].detach()), name


def test_every_model_that_a_round_has_from_others_is_held_against_the_runs(tmp_path: Path) -> None:
    """Those that answer, are compared with, and are the reference are policies; a reward model is refused there."""
    tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
    reward_model = tmp_path / "reward_model"
    save_model(load_reward_model(resolve_model("embedded:opt-tiny"), fresh_head_seed=0), tokenizer, reward_model)
    demonstrations = config(tmp_path).data.model_dump(mode="json") | {"comparisons": None}

    def of_a_round(model: str) -> dict[str, Any]:
        return {
            "collect": {"models": [{"from": model}]},
            "rl": {"from": model, "reference_from": model},
            "evaluate": {"previous_from": model},
        }

    with opened(config(tmp_path, data=demonstrations, **of_a_round("embedded:opt-tiny")), local=True) as session:
        assert {"collect.models[0].from", "rl.reference_from", "evaluate.previous_from"} <= session.starts.given.keys()
        assert session.start()
    for key, section in of_a_round(str(reward_model)).items():
        own = config(tmp_path, name=key, data=demonstrations, **{key: section})
        with opened(own, local=True) as session, pytest.raises(UserError, match="is a reward model"):
            session.start()


def test_trackers_end_with_their_run_where_runs_share_a_connection(tmp_path: Path) -> None:
    """As the rounds of a run do."""
    before = set(threading.enumerate())

    def trackers() -> set[str]:
        return {thread.name for thread in set(threading.enumerate()) - before} & {"tracking"}

    with contextlib.ExitStack() as connection:
        with opened(config(tmp_path, tracking=["tensorboard"]), local=True, connection=connection) as session:
            session.start()
            assert trackers()
        assert not trackers()
