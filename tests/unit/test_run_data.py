"""What each stage gets of the data, what is said of it at the start, and `rayrlhf data`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Prompt
from rayrlhf.data.run_data import RunData
from rayrlhf.errors import UserError
from rayrlhf.reports.data_usage import shared_prompts, usages
from rayrlhf.rewards.labellers import ReferenceLabeller
from tests.rows import write_rows

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "it takes about seven minutes", "nobody here can say it"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny")


def demonstrations(directory: Path, again: int = 1) -> str:
    """120 prompts, with `again` responses each."""
    rows = [{"prompt": f"What is {i}?", "response": f"It is {k}."} for i in range(120) for k in range(again)]
    return write_rows(directory / "demonstrations.jsonl", rows)


def prompts(directory: Path, **more: Any) -> str:
    return write_rows(directory / "prompts.jsonl", [{"prompt": f"Why {i}?", **more} for i in range(60)])


def pairs(directory: Path) -> str:
    rows = [{"prompt": f"What is {i}?", "chosen": FIRST, "rejected": SECOND} for i in range(100, 160)]
    return write_rows(directory / "pairs.jsonl", rows)


def run_data(tokenizer: PreTrainedTokenizerBase, lines: list[str], data: dict[str, Any], **settings: Any) -> RunData:
    return RunData(parse_config({"name": "a", "data": data, **settings}, "test"), tokenizer, lines.append)


def texts(records: Any) -> set[str]:
    return {record.text for record in records}


def test_which_prompts_rl_has(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Each once, though every prompt has two rows."""
    path, found, lines = demonstrations(tmp_path, again=2), {}, list[str]()
    for wanted in ("rest", "sft", "all"):
        data = run_data(tokenizer, lines, {"demonstrations": path, "rl_prompts": wanted})
        data.read()
        assert len(texts(data.rl)) == len(data.rl) and len(texts(data.evaluated)) == len(data.evaluated)
        assert len(data.collect) == len(texts(data.collect)) > 0
        found[wanted] = texts(data.rl)
        assert f"rl asks {len(data.rl)} prompts, each once, of {2 * len(data.rl)} rows" in lines
        assert [record.reference for record in data.rl] == ["It is 0."] * len(data.rl)  # those of the first rows
        train = data.train
    game = {"environment": {"path": "rayrlhf.environments.guess:Guess"}, "rewards": [{"kind": "environment"}]}
    played = run_data(tokenizer, [], {"demonstrations": path}, **game).rl  # of a run without a reward model
    assert len(played) == 2 * len(found["rest"] | texts(train.reward_model))
    assert found["sft"] == texts(train.sft) and len(train.sft) == 2 * len(found["sft"])
    assert not found["rest"] & (found["sft"] | texts(train.reward_model))
    # In the last run nobody else asks for the rest: it is part of all.
    assert found["all"] == texts(train.sft) | texts(train.reward_model) | texts(train.rl) > found["rest"]


def test_sft_may_take_all_if_rl_asks_its_prompts_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    shares = {"demonstrations": demonstrations(tmp_path), "sft_fraction": 1.0, "reward_model_fraction": 0.0}
    with pytest.raises(UserError, match="must stay below 1: .*; or set rl_prompts: sft"):
        run_data(tokenizer, [], shares)
    data = run_data(tokenizer, [], shares | {"rl_prompts": "sft"})
    data.read()
    assert texts(data.rl) == texts(data.train.sft) and not data.train.rl


@pytest.mark.parametrize(
    ("data", "evaluate", "fault"),
    [
        ({"dev_fraction": 1.0}, {}, "evaluate: the test split is empty; change data.dev_fraction or name a file in"),
        ({"dev_fraction": 0.0}, {"split": "dev"}, "evaluate: the dev split is empty; change data.dev_fraction or name"),
        ({}, {"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_mistakes_of_the_last_stage_show_before_the_first(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, data: dict[str, Any], evaluate: dict[str, Any], fault: str
) -> None:
    source = {"demonstrations": demonstrations(tmp_path)} | data
    with pytest.raises(UserError, match=fault):
        run_data(tokenizer, [], source, evaluate=evaluate).read()
    run_data(tokenizer, [], source, evaluate=evaluate, stages=["sft"]).read()  # which leaves it out


def test_prompts_of_their_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines: list[str] = []
    given = {"demonstrations": demonstrations(tmp_path), "prompts": prompts(tmp_path), "comparisons": pairs(tmp_path)}
    data = run_data(tokenizer, lines, given)
    data.read()
    asked = [*data.rl, *run_data(tokenizer, [], given, evaluate={"split": "dev"}).evaluated, *data.evaluated]
    assert len(asked) == 60 == len(texts(asked)) and all(text.startswith("Why") for text in texts(asked))
    assert all(prompt.reference is None for prompt in asked) and data.prompts(data.rl)[0].reference is None
    assert not data.train.reward_model
    assert [line.split(str(tmp_path))[0] for line in lines if "read as" in line] == [
        "data.demonstrations: ", "data.comparisons: ", "data.prompts: ",
    ]  # fmt: skip
    rest = len(data.train.rl)
    assert rest and lines[-2:] == [
        f"{len(data.rl)} of {len(data.rl)} prompts of rl have no reference: what compares with one, such as gold by "
        "ROUGE, leaves them out",
        f"{rest} train demonstrations are used by no stage; data.sft_fraction=1 gives them to sft",
    ]


def test_prompts_with_a_response_have_a_reference(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines: list[str] = []
    given = {"demonstrations": demonstrations(tmp_path), "prompts": prompts(tmp_path, response="So.")}
    data = run_data(tokenizer, lines, given)
    data.read()
    assert {prompt.reference for prompt in data.rl} == {"So."} and not any("no reference" in line for line in lines)


def test_gold_leaves_out_what_has_no_reference() -> None:
    labeller = ReferenceLabeller()
    assert labeller.measure(Prompt("a", "What?"), "a cold pot") is None
    assert labeller.measure(Prompt("a", "What?", "a cold pot"), "a cold pot") == 1.0
    with pytest.raises(UserError, match="'a' has no reference"):
        labeller.rank(Prompt("a", "What?"), ["a", "b"])


def test_a_judge_that_compares_with_the_reference_needs_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    judge = {"kind": "judge", "name": "j", "url": "http://127.0.0.1:9/v1", "model": "m", "rubric": "r"}
    given = {"demonstrations": demonstrations(tmp_path), "prompts": prompts(tmp_path)}
    rewards = [judge | {"compare": "reference"}]
    with pytest.raises(UserError, match=r"rewards: 'j' compares with .* and 5\d of 5\d prompts of rl have none"):
        run_data(tokenizer, [], given, rewards=rewards).read()


def test_what_is_cut_dropped_and_unused_is_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In a run of SFT and DPO on given pairs, which has no use for 60 % of the demonstrations."""
    rows = [{"prompt": f"What is {i}?", "response": "word " * (30 if i < 7 else 2)} for i in range(40)]
    rows += [{"prompt": "line\n" * 60 + f"{i}?", "response": "short"} for i in range(3)]
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [*rows, rows[0]])
    write_rows(folder / "validation.jsonl", [{"prompt": f"Who is {i}?", "response": "a"} for i in range(20)])
    lines: list[str] = []
    data = run_data(
        tokenizer,
        lines,
        {
            "demonstrations": {"path": str(folder), "format": "prompts"},
            "comparisons": {"path": pairs(tmp_path), "format": "preferences"},
            "max_prompt_tokens": 40,
            "max_response_tokens": 12,
        },
        stages=["sft", "dpo"],
    )
    data.read()
    sft, unused = len(data.train.sft), len(data.unused)
    assert lines[:2] == [
        f"43 train demonstrations from {folder}; dropped: 1 duplicate; 3 prompts cut to data.max_prompt_tokens=40; "
        "7 responses cut to data.max_response_tokens=12",
        f"20 valid demonstrations from {folder}; dropped: none",
    ]
    assert lines[-1].startswith(f"{unused} train demonstrations are used by no stage") and sft + unused == 43


def test_usage_by_use(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Twenty prompts of the pairs are demonstrations, too."""
    given = {"demonstrations": demonstrations(tmp_path), "comparisons": pairs(tmp_path), "max_response_tokens": 3}
    config = parse_config({"name": "a", "data": given}, "test")
    found = usages(config, tokenizer, ["demonstrations", "comparisons"])
    counts = {(usage.kind, usage.use): len(usage.prompts) for usage in found}
    assert {use for _, use in counts} == {"sft", "rl", "dev", "test", "train", "held out"}
    assert sum(n for (kind, _), n in counts.items() if kind == "demonstrations") == 120
    assert sum(n for (kind, _), n in counts.items() if kind == "comparisons") == 60
    whole = [len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) + 1 for text in (FIRST, SECOND)]
    assert [len(ids) for ids in found[-1].responses[:2]] == whole and min(whole) > 3
    shared = [line.split() for line in shared_prompts(found)]
    assert sum(int(line[0]) for line in shared) == 20


def test_the_command_reads_a_file_and_a_config(tmp_path: Path) -> None:
    """In one process, as its imports take most of the time: a CSV, pairs, a config, and a mistake."""
    rows = "".join(f"What is {i}?,It is {i}.\n" for i in range(80))
    (tmp_path / "mine.csv").write_text("question,answer\n" + rows)
    source = {"path": str(tmp_path / "mine.csv"), "columns": {"prompt": "question", "response": "answer"}}
    (tmp_path / "run.yaml").write_text(json.dumps({"name": "mine", "data": {"demonstrations": source}}))
    calls = [[pairs(tmp_path)], [str(tmp_path / "run.yaml")], [str(tmp_path / "mine.csv")]]
    code = f"""
import typer.testing
from jobs.cli import app
for call in {calls!r}:
    result = typer.testing.CliRunner().invoke(app, ["data", *call])
    print(result.exit_code, result.output)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    said = out.stdout
    assert "read as preferences" in said and "held out" in said  # the pairs
    assert "read as prompts" in said and "</s>What is" in said and "It is" in said  # the config
    assert "not recognised, its columns are: question, answer" in said + out.stderr  # the file alone
