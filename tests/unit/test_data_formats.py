"""What rows of every shape mean, how a format is recognised, and rules that hold for all formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayrlhf.config_data import DataConfig, DatasetConfig
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.data.files import SourceRow
from rayrlhf.data.formats import FORMATS, Use, recognise, renamed
from rayrlhf.data.records import Message
from rayrlhf.data.sources import DataSet, Rendering
from rayrlhf.data.splits import split_train, split_valid
from rayrlhf.data.template import ChatPrompt, plain_prompt, told_first
from rayrlhf.errors import UserError
from tests.rows import write_rows

ROOT = Path(__file__).parents[2]
BEST, WORST = "it takes seven minutes in boiling water", "I would rather not talk about eggs today"
USER, SYSTEM = {"role": "user", "content": "How long?"}, {"role": "system", "content": "Be brief."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = "\n\nHuman: How long?\n\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny")


def opened(
    tokenizer: PreTrainedTokenizerBase, path: str, *uses: Use, system: str | None = None, **keys: Any
) -> DataSet:
    return DataSet([DatasetConfig(path=path, **keys)], Rendering(tokenizer, 100, system), *uses)


# ---- the meaning of a row, and the format that is recognised by it


@pytest.mark.parametrize(
    ("row", "format", "prompt", "answer"),
    [
        ({"prompt": "Why?", "completion": "So."}, "prompts", "Why?", "So."),
        ({"prompt": "Why?", "response": "So."}, "prompts", "Why?", "So."),
        ({"prompt": [USER], "completion": [said("So.")]}, "prompts", ASKED, "So."),
        ({"messages": [USER, said("So.")]}, "prompts", ASKED, "So."),
        ({"messages": [SYSTEM, USER, said("So.")]}, "prompts", "\n\nSystem: Be brief." + ASKED, "So."),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "How "}, {"text": "long?"}]},
                    said("A"),
                ]
            },
            "prompts",
            ASKED,
            "A",
        ),
        ({"instruction": "Translate.", "input": "Tee", "output": "Tea"}, "alpaca", "Translate.\n\nTee", "Tea"),
        ({"instruction": "How long?", "input": "", "output": "Now"}, "alpaca", ASKED, "Now"),
        (
            {"conversations": [{"from": "human", "value": "How long?"}, {"from": "gpt", "value": "Long."}]},
            "sharegpt",
            ASKED,
            "Long.",
        ),
        ({"subreddit": "a", "title": "b", "post": "c", "summary": "d"}, "tldr", "POST: c\n\nTL;DR:", "d"),
        ({"prompt": "Why?", "completion": "So.", "label": True}, "unpaired", "Why?", "So."),
        ({"prompt": "Why?", "chosen": BEST, "rejected": WORST}, "preferences", "Why?", BEST),
    ],
)
def test_demonstrations(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], format: str, prompt: str, answer: str
) -> None:
    source = opened(tokenizer, write_rows(tmp_path / "a.jsonl", [row]), "demonstration")
    (record,) = source.demonstrations("all").records
    assert prompt in record.prompt and record.response == answer
    assert [line.split(": ")[1].split(" ")[2] for line in source.remarks] == [format]


PAIR = [said(BEST)], [said(WORST)]
WHOLE = {"chosen": [USER, *PAIR[0]], "rejected": [USER, *PAIR[1]]}


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [
        ({"prompt": "Why?", "chosen": BEST, "rejected": WORST}, "preferences", "Why?"),
        ({"prompt": [USER], "chosen": PAIR[0], "rejected": PAIR[1]}, "preferences", ASKED),
        (WHOLE, "preferences", ASKED),
        (
            {
                "prompt": "How long?",
                "messages": [USER, *PAIR[0]],
                "chosen": [USER, *PAIR[0]],
                "rejected": [USER, *PAIR[1]],
            },
            "preferences",
            ASKED,
        ),
        (
            {"prompt": [USER], "chosen": [said("So"), USER, *PAIR[0]], "rejected": [said("So"), USER, *PAIR[1]]},
            "preferences",
            "\n\nHuman: How long?\n\nAssistant: So" + ASKED,
        ),
        ({"chosen": f"Eggs now: {BEST}", "rejected": f"Eggs now: {WORST}"}, "preferences", "Eggs now: "),
        ({"chosen": f"{ASKED} {BEST}", "rejected": f"{ASKED} {WORST}"}, "hh_rlhf", ASKED),
        ({"prompt": "Why?", "responses": [BEST, WORST]}, "preferences", "Why?"),
        ({"prompt": "Why?", "responses": [WORST, BEST], "ranking": [1, 0]}, "preferences", "Why?"),
        ({"messages": [USER], "responses": [WORST, BEST], "scores": [1, 2.5]}, "preferences", ASKED),
        ({"history": "How long?", "human_ref_A": WORST, "human_ref_B": BEST, "labels": 0}, "shp", ASKED),
    ],
)
def test_comparisons(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], format: str, prompt: str
) -> None:
    source = opened(tokenizer, write_rows(tmp_path / "a.jsonl", [row]), "comparison", "labelled")
    (record,) = source.comparisons("all").records
    assert record.prompt.strip() == prompt.strip() and record.responses == (BEST, WORST)
    assert record.scores == ((2.5, 1.0) if "scores" in row else None)
    assert f"read as {format} " in source.remarks[0]


def test_equal_scores_are_no_preference(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {i}?", "responses": [BEST, WORST], "scores": [1, i]} for i in (0, 1)]
    found = opened(tokenizer, write_rows(tmp_path / "a.jsonl", rows), "comparison").comparisons("all")
    assert len(found.records) == 1 and found.dropped == {"equal_scores": 1}


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "How long?"}, None),
        ({"messages": [USER]}, None),
        ({"prompt": [USER], "response": "So."}, "So."),
        ({"prompt": "How long?", "completion": "No.", "label": False}, None),
        ({"prompt": "How long?", "completion": "Yes.", "label": True}, "Yes."),
        ({"instruction": "How long?", "output": "Now"}, "Now"),
    ],
)
def test_prompts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], reference: str | None
) -> None:
    source = opened(tokenizer, write_rows(tmp_path / "a.jsonl", [row, row]), "prompt")
    found = source.prompts("all")
    assert [p.reference for p in found.records] == [reference] and "How long?" in found.records[0].text
    assert found.dropped == {"duplicate": 1}


@pytest.mark.parametrize(
    ("rows", "uses", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            ["demonstration"],
            "not recognised, .*: question, answer; .*"
            "columns: {prompt: question, response: answer}, or set format to one of these: .*prompts, ",
        ),
        (
            [{"prompt": "a", "Better": "b", "worse": "c"}],
            ["comparison"],
            "not recognised, .*columns: {chosen: Better, rejected: worse}",
        ),
        ([{"a": "b"}], ["demonstration"], "not recognised, .*columns: {prompt: question}, or"),
        ([{"prompt": "a"}], ["demonstration"], "not recognised, its columns are: prompt; "),
        (
            [{"prompt": "a", "response": "b", "instruction": "c", "output": "d"}],
            ["demonstration"],
            "may be prompts or alpaca .*: prompt, response, instruction, output.; set format",
        ),
        (
            [{"prompt": "a", "response": "b"}],
            ["comparison", "labelled"],
            "not recognised, .*: prompt, resp",
        ),
        ([{"chosen": "a"}], ["comparison", "labelled"], "not recognised, its columns are: chosen"),
    ],
)
def test_what_is_not_recognised(rows: list[dict[str, Any]], uses: list[Use], message: str) -> None:
    with pytest.raises(UserError, match=f"a.jsonl: the format (is |){message}") as error:
        recognise("a.jsonl", [SourceRow("a", row) for row in rows], uses)
    assert "\n" not in str(error.value)


def test_every_format_is_one_of_some_use() -> None:
    for name, each in FORMATS.items():
        assert each.prompt or each.comparison or each.labelled, name
        assert each.prompt or not each.demonstration, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": "x"}], "message 1 has a part of the type 'image'; only text"),
        ([{"type": "text"}], "message 1 has a part without a text"),
        (None, "message 1 needs a role"),
    ],
)
def test_parts_that_are_no_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: Any, message: str) -> None:
    row = {"messages": [{"role": "user", "content": content}, said("a")]}
    with pytest.raises(UserError, match=f"line 1: {message}"):
        opened(tokenizer, write_rows(tmp_path / "a.jsonl", [row]), "demonstration").demonstrations("all")


def test_own_names_of_columns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So.", "level": 2}])
    columns = {"prompt": "question", "response": "answer"}
    (record,) = opened(tokenizer, path, "demonstration", columns=columns).demonstrations("all").records
    assert (record.prompt, record.response, record.metadata) == ("Why?", "So.", {"level": 2})
    for wrong, message in (
        ({"prompt": "asked"}, "the file has no column 'asked'; there are: question, answer, level"),
        ({"promt": "question"}, "no format has a column 'promt'; there are: chosen, "),
    ):
        with pytest.raises(UserError, match=message):
            opened(tokenizer, path, "demonstration", columns=wrong)
    swapped = renamed(SourceRow("a", {"a": 1, "b": 2}), {"a": "b", "b": "a"})
    assert swapped.values == {"a": 2, "b": 1}


# ---- bad rows


def test_dialogues_that_end_with_the_human_and_empty_sides(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    good = {"chosen": f"{ASKED} {BEST}", "rejected": f"{ASKED} {WORST}"}
    rows: list[dict[str, Any]] = [
        good,
        {"chosen": f"{ASKED} {BEST}\n\nHuman: Thanks, and then?", "rejected": f"{ASKED} {WORST}\n\nHuman: No."},
        {**good, "rejected": None},
        {**good, "chosen": ""},
    ]
    for kind in ("hh_rlhf", None):
        found = opened(tokenizer, write_rows(tmp_path / "a.jsonl", rows), "comparison", format=kind).comparisons("all")
        assert [c.responses for c in found.records] == [(BEST, WORST)]
        assert found.dropped == {"ends_with_the_human": 1, "empty_response": 2}


def test_bad_rows_are_skipped_and_counted_on_request(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "response": "b"}, {"prompt": "b?", "response": ""}, {"prompt": "c?", "response": "d"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="line 2: 'response' is empty"):
        opened(tokenizer, path, "demonstration").demonstrations("all")
    found = opened(tokenizer, path, "demonstration", skip_bad_rows=True).demonstrations("all")
    assert len(found.records) == 2 and found.dropped == {"malformed": 1}
    with pytest.raises(UserError, match="line 1: no column 'title'"):  # the format is wrong, not a row
        opened(tokenizer, path, "demonstration", skip_bad_rows=True, format="tldr").demonstrations("all")


def test_half_an_emoji_is_replaced_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "half \\ud83d?", "response": "a \\udc4d", "more": ["\\ud83d"]}\n'
        '{"prompt": "whole \\ud83d\\udc4d?", "response": "b"}\n'
    )
    found = opened(tokenizer, str(path), "demonstration").demonstrations("all")
    assert [(r.prompt, r.response) for r in found.records] == [("half \ufffd?", "a \ufffd"), ("whole 👍?", "b")]
    assert found.records[0].metadata == {"more": ["\ufffd"]} and found.mended == 1


def test_a_prompt_of_special_tokens_alone_is_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "</s>"},
        {"messages": [{"role": "user", "content": "</s>"}]},
        {"prompt": "</s>\nWhy?"},
    ]
    rows = [{**row, "response": "b"} for row in asked]
    found = opened(tokenizer, write_rows(tmp_path / "a.jsonl", rows), "demonstration").demonstrations("all")
    assert [r.prompt for r in found.records] == ["\nWhy?"] and found.dropped == {"empty_prompt": 2}
    assert found.cleared == 1


def test_records_that_lost_texts_of_the_tokenizer_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Why?", "response": "So."},
        {"prompt": "Why</s>?", "response": "So."},
        {"prompt": "How?", "response": "Thus.</s>"},
        {"messages": [{"role": "user", "content": "A\n\nAssistant: B"}], "response": "C"},
    ]
    found = opened(tokenizer, write_rows(tmp_path / "a.jsonl", rows), "demonstration").demonstrations("all")
    assert found.cleared == 3 and [r.response for r in found.records] == ["So.", "So.", "Thus.", "C"]


# ---- rows of one prompt


def test_rows_of_one_prompt_are_in_one_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Whatever ids they have. The key is the smallest, so that the order of the rows does not matter."""
    rows = [{"id": f"r{i}", "prompt": f"Question {i % 60}?", "response": f"answer {i}"} for i in range(300)]
    shares = []
    for own in (rows, rows[::-1]):
        source = opened(tokenizer, write_rows(tmp_path / "a.jsonl", own), "demonstration")
        train = split_train(source.demonstrations("train").records, DataConfig())
        dev, test = split_valid(source.demonstrations("valid").records, DataConfig())
        splits = [train.sft, train.reward_model, train.rl, dev, test]
        prompts = [{record.prompt for record in split} for split in splits]
        assert sum(map(len, splits)) == 300 and sum(map(len, prompts)) == 60 and all(prompts[:3])
        shares.append([{record.id for record in split} for split in splits])
    assert shares[0] == shares[1]


def test_an_id_may_name_a_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"id": "q", "prompt": "Why?", "response": text} for text in ("a", "b", "a")]
    found = opened(tokenizer, write_rows(tmp_path / "a.jsonl", rows), "demonstration").demonstrations("all")
    first, second = found.records
    assert first.id == "q" and second.id.startswith("q-") and first.split_key == second.split_key == "q"
    assert found.dropped == {"duplicate": 1}


def test_validation_rows_whose_prompt_is_in_training_are_dropped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"{i}?", "response": "a"} for i in range(3)])
    write_rows(tmp_path / "validation.jsonl", [{"prompt": f"{i}?", "response": "b"} for i in range(2, 5)])
    found = opened(tokenizer, str(tmp_path), "demonstration").demonstrations("valid")
    assert [r.prompt for r in found.records] == ["3?", "4?"] and found.dropped == {"prompt_in_train": 1}


# ---- several sources


def test_sources_are_mixed_by_weight(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Both files count from 1, and the second one is drawn from until it has a third of the other's records."""
    for name in "ab":
        rows = [{"id": str(i), "prompt": f"{name}{i}?", "response": "r"} for i in range(400)]
        write_rows(tmp_path / f"{name}.jsonl", rows)

    def drawn(weights: tuple[float, float] | None) -> tuple[list[str], dict[str, int]]:
        sources = [
            DatasetConfig(path=str(tmp_path / f"{name}.jsonl"), weight=weights[k] if weights else None)
            for k, name in enumerate("ab")
        ]
        found = DataSet(sources, Rendering(tokenizer, 100), "demonstration").demonstrations("train")
        assert len({record.id for record in found.records}) == len(found.records)
        return [record.prompt for record in found.records], found.dropped

    everything, _ = drawn(None)
    whole = [sum(prompt[0] == name for prompt in everything) for name in "ab"]
    mixed, dropped = drawn((3.0, 1.0))
    counts = [sum(prompt[0] == name for prompt in mixed) for name in "ab"]
    assert counts == [whole[0], round(whole[0] / 3)] and dropped == {"not_drawn": sum(whole) - sum(counts)}
    assert drawn((6.0, 2.0))[0] == mixed and set(mixed) < set(everything)


def test_a_prompt_of_two_sources_is_in_one_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """One has a validation split, and the other, which has none, the same prompts with other answers."""
    (tmp_path / "both").mkdir()
    for name, first in (("train", 0), ("validation", 50)):
        rows = [{"prompt": f"{i}?", "response": "a"} for i in range(first, first + 50)]
        write_rows(tmp_path / "both" / f"{name}.jsonl", rows)
    write_rows(tmp_path / "one.jsonl", [{"prompt": f"{i}?", "response": "b"} for i in range(0, 150)])
    sources = [DatasetConfig(path=str(tmp_path / name)) for name in ("both", "one.jsonl")]
    data = DataSet(sources, Rendering(tokenizer, 100), "demonstration")
    train, valid = (data.demonstrations(split) for split in ("train", "valid"))
    sides = [{record.prompt for record in found.records} for found in (train, valid)]
    assert not sides[0] & sides[1] and sides[0] >= {f"{i}?" for i in range(50)}
    # Of the rest, one prompt in about ten stays out of training, with the answers of both.
    assert sum(valid.dropped.values()) == len(sides[0] & {f"{i}?" for i in range(50, 100)}) > 0 < len(sides[1])


def test_sources_in_the_config() -> None:
    """A path alone, one source, or several; what is read is what is written."""
    alone = parse_config({"name": "a", "data": {"demonstrations": "a.csv"}}, "test")
    assert alone == parse_config({"name": "a", "data": {"demonstrations": {"path": "a.csv"}}}, "test")
    assert dump_config(alone)["data"]["demonstrations"]["path"] == "a.csv"
    several = parse_config({"name": "a", "data": {"demonstrations": ["a.csv", {"path": "b", "format": "shp"}]}}, "test")
    assert [source.path for source in several.data.demonstrations] == ["a.csv", "b"]
    for config in (alone, several):
        assert parse_config(json.loads(json.dumps(dump_config(config))), "test") == config
    for data, message in (
        ({"demonstrations": {"path": "a", "fromat": "shp"}}, "key 'data.demonstrations.fromat'; did you mean 'format'"),
        ({"demonstrations": ["a", {"format": "shp"}]}, r"key 'data.demonstrations\[1\].path' is missing"),
        ({"demonstrations": [{"path": "a", "weight": 1.0}, "b"]}, "demonstrations: some of the sources have a weight"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config({"name": "a", "data": data}, "test")


def test_the_reward_models_share_is_none_where_comparisons_are_given() -> None:
    def share(**data: Any) -> float:
        return parse_config({"name": "a", "data": data}, "test").data.reward_model_fraction

    assert share() == 0.3 and share(comparisons="c.jsonl") == 0.0
    assert share(comparisons="c.jsonl", reward_model_fraction=0.2) == 0.2


# ---- the system prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_system_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    asked = (Message("user", "Why?"),)
    own = ChatPrompt((Message("system", "Mine."), *asked))
    assert told_first(tokenizer, "Be kind.", own) == own
    assert (
        told_first(tokenizer, "Be kind.", ChatPrompt(asked)).text == "\n\nSystem: Be kind.\n\nHuman: Why?\n\nAssistant:"
    )
    assert told_first(tokenizer, "Be kind.", plain_prompt("A post.\nWhy? ")).text == "Be kind.\n\nA post.\nWhy? "
    chat = AutoTokenizer.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny")
    chat.chat_template = TEMPLATE
    long = "word " * 200
    rows: list[dict[str, Any]] = [{"prompt": f"{long}\nWhy?", "response": "So."}, {"messages": [USER, said("a")]}]
    source = opened(chat, write_rows(tmp_path / "a.jsonl", rows), "demonstration", system="Be kind.")
    text, dialogue = source.demonstrations("all").records
    # The text's last line and all that frames it stay when it is cut.
    assert text.prompt.startswith("<system>Be kind.</system><user>word word") and text.prompt.endswith(
        "\nWhy?</user><assistant>"
    )
    assert len(text.prompt) < len(long) and text.tokens > 100
    assert dialogue.prompt == "<system>Be kind.</system><user>How long?</user><assistant>"
