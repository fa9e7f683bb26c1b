"""Reading data sets: every adapter, ids and duplicates, validation splits, and what the errors say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data.formats import FORMATS
from rayrlhf.data.loading import Split
from rayrlhf.data.published import parse_dialogue
from rayrlhf.data.records import Comparison, Demonstration, LabelledAnswer, Message
from rayrlhf.data.sources import DataSet, Rendering, read_demonstrations
from rayrlhf.data.splits import check_disjoint
from rayrlhf.data.tokens import encode_prompts
from rayrlhf.errors import UserError

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny")


def source(format: str | None, path: Path | str, **keys: Any) -> list[DatasetConfig]:
    return [DatasetConfig(format=format, path=str(path), **keys)]


def read_published(
    sources: list[DatasetConfig], split: Split, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Comparison], dict[str, int]]:
    found = DataSet(sources, Rendering(tokenizer, limit), "comparison").comparisons(split)
    return list(found.records), found.dropped


def read_labelled(
    sources: list[DatasetConfig], split: Split, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[LabelledAnswer], dict[str, int]]:
    found = DataSet(sources, Rendering(tokenizer, limit), "labelled").labelled(split)
    return list(found.records), found.dropped


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def tldr_rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "subreddit": "tea", "title": f"Tea {i}", "post": f"Pot {i} is cold.", "summary": f"Cold {i}."}
        | changes
        for i in range(count)
    ]


# ---- the shipped data


def test_embedded_tldr(tokenizer: PreTrainedTokenizerBase) -> None:
    embedded = source("tldr", "embedded:tldr")
    train = read_demonstrations(embedded, "train", tokenizer, 192)
    valid = read_demonstrations(embedded, "valid", tokenizer, 192)
    assert (len(train), len(valid)) == (2527, 396)
    check_disjoint(train=train, valid=valid)
    for record, ids in zip(train, encode_prompts(tokenizer, [d.prompt for d in train]), strict=True):
        assert len(ids) <= 192
        assert record.prompt.startswith(
            f"SUBREDDIT: r/{record.prompt[13:].split()[0]}\n\nTITLE: {record.title}\n\nPOST: "
        )
        assert record.prompt.endswith("\n\nTL;DR:") and record.response == record.response.strip() != ""


def test_ids_do_not_depend_on_the_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    hh = source("hh_rlhf", DATA / "hh_harmless_small.jsonl.gz")
    short, long = (read_demonstrations(hh, "all", tokenizer, limit) for limit in (60, 500))
    assert [d.id for d in short] == [d.id for d in long]
    assert [d.prompt for d in short] != [d.prompt for d in long]


# ---- published data sets, with the columns and splits of the hub


def test_openai_summarize_tldr(tokenizer: PreTrainedTokenizerBase) -> None:
    hub_like = source("openai_summarize_tldr", DATA / "openai_summarize_tldr", valid_split="valid")
    train = read_demonstrations(hub_like, "train", tokenizer, 200)
    assert [d.title for d in train] == [
        "Tomato leaves turn yellow",
        "Bread dough never rises in winter",
        "Chain slips under load",
        "Cannot finish long novels",
    ]
    # Re-rendered with the one template: the hub has single newlines between the parts.
    assert train[1].prompt == (
        "SUBREDDIT: r/cooking\n\nTITLE: Bread dough never rises in winter\n\nPOST: I bake the same loaf every Sunday. "
        "In summer it doubles in two hours.\n\nIn winter it hardly moves, because my kitchen has sixteen degrees."
        "\n\nTL;DR:"
    )
    assert train[1].response == "My dough does not rise in a cold kitchen and I look for a warm place."
    assert len(read_demonstrations(hub_like, "valid", tokenizer, 200)) == 2
    assert (train[2].prompt, train[2].response) == (train[2].text, train[2].reference)


def test_openai_summarize_comparisons(tokenizer: PreTrainedTokenizerBase) -> None:
    hub_like = source("openai_summarize_comparisons", DATA / "openai_summarize_comparisons", valid_split="valid1")
    train, dropped = read_published(hub_like, "train", tokenizer, 200)
    assert dropped == {"identical": 1, "nearly_empty": 1}
    assert train[1].responses == (
        "Dough does not rise in my cold winter kitchen.",
        "I bake bread every single Sunday at home.",
    )
    assert all(c.prompt.endswith("\n\nTL;DR:") for c in train) and len(train) == 3
    valid, dropped = read_published(hub_like, "valid", tokenizer, 200)
    assert len(valid) == 1 and dropped == {}


def test_comparisons_and_demonstrations_share_the_rendering(tokenizer: PreTrainedTokenizerBase) -> None:
    posts = read_demonstrations(source("openai_summarize_tldr", DATA / "openai_summarize_tldr"), "train", tokenizer, 60)
    pairs, _ = read_published(
        source("openai_summarize_comparisons", DATA / "openai_summarize_comparisons", valid_split="valid1"),
        "train",
        tokenizer,
        60,
    )
    assert {c.prompt for c in pairs} < {d.prompt for d in posts}


def test_hh_rlhf(tokenizer: PreTrainedTokenizerBase) -> None:
    path = DATA / "hh_harmless_small.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    demonstrations = read_demonstrations(source("hh_rlhf", path), "all", tokenizer, 1000)
    assert len(demonstrations) == len(rows) == 43
    for row, record in zip(rows, demonstrations, strict=True):
        whole = record.prompt + " " + record.response
        assert whole.split() == row["chosen"].split()  # nothing lost but white space
    comparisons, dropped = read_published(source("hh_rlhf", path), "all", tokenizer, 1000)
    assert len(comparisons) + sum(dropped.values()) == 43
    by_prompt = {d.prompt: d.response for d in demonstrations}
    for comparison in comparisons:
        assert comparison.responses[0] == by_prompt[comparison.prompt]


def test_hh_rlhf_rows_that_cannot_be_used_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def pair(context: str, chosen: str, rejected: str, other: str | None = None) -> dict[str, str]:
        return {"chosen": f"{context}\n\nAssistant:{chosen}", "rejected": f"{other or context}\n\nAssistant:{rejected}"}

    good = pair("\n\nHuman: What is tea?", " A drink made of leaves.", " It is not a kind of coffee.")
    rows = [
        good,
        good,
        pair("\n\nHuman: What is tea?", "", " It is not a kind of coffee."),
        pair("\n\nHuman: What is tea?", " A", " B", other="\n\nHuman: What is coffee?"),
        pair("\n\nHuman: What is tea?", " Just leaves.", " It is not a kind of coffee."),
        pair("Tea is fine", " A drink made of leaves.", " It is not a kind of coffee."),
    ]
    path = write_jsonl(tmp_path / "hh.jsonl", rows)
    comparisons, dropped = read_published(source("hh_rlhf", path), "all", tokenizer, 100)
    assert [c.responses for c in comparisons] == [("A drink made of leaves.", "It is not a kind of coffee.")]
    assert dropped == {
        "duplicate": 1,
        "empty_response": 1,
        "different_prompts": 1,
        "nearly_empty": 1,
        "not_a_dialogue": 1,
    }


def test_answers_that_are_dropped_from_a_row_that_stays_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    long = [f"It is a drink made of {each} and water." for each in ("leaves", "beans", "milk")]
    answers = [[*long, "No."], [long[0], long[1], long[0], "No."], long[:2], [long[0], "No."]]
    path = write_jsonl(
        tmp_path / "ranked.jsonl", [{"prompt": f"What is {i}?", "responses": own} for i, own in enumerate(answers)]
    )
    comparisons, dropped = read_published(source(None, path), "all", tokenizer, 100)
    assert [c.responses for c in comparisons] == [tuple(long), tuple(long[:2]), tuple(long[:2])]
    assert dropped == {"answers_of_kept_rows": 3, "nearly_empty": 1}


def test_turns_of_one_speaker_become_one() -> None:
    messages = parse_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nd\n\nHuman: e")
    assert [tuple(m) for m in messages] == [("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e")]


def test_shp(tokenizer: PreTrainedTokenizerBase) -> None:
    comparisons, dropped = read_published(source("shp", DATA / "shp.jsonl"), "all", tokenizer, 100)
    assert dropped == {} and [c.source for c in comparisons] == ["askbaking_train"] * 2 + ["askcarguys_train"]
    assert comparisons[0].responses[0].startswith("Leave it out")  # labels 1: A
    assert comparisons[1].responses[0].startswith("A paper bag")  # labels 0: B
    assert comparisons[0].prompt == (
        "\n\nHuman: How do I keep the crust of my bread crisp until the evening?\n\nAssistant:"
    )


# ---- own files


def test_own_demonstrations_in_every_kind_of_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "What is tea?", "response": " A drink. "},
        {"id": "b", "prompt": "What is milk?", "response": "A drink, too."},
    ]
    text = "\n\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")  # blank lines and a byte order mark do no harm
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        assert read_demonstrations(source("prompts", tmp_path / name), "all", tokenizer, 50) == [
            Demonstration("a", "What is tea?", "A drink."),
            Demonstration("b", "What is milk?", "A drink, too."),
        ]


def test_own_messages(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    question = {"role": "user", "content": "What is tea?"}
    rows: list[dict[str, Any]] = [
        {"id": "a", "messages": [question], "reference": "A drink."},
        {"id": "b", "messages": [question, {"role": "assistant", "content": "A leaf."}]},
    ]
    records = read_demonstrations(source("prompts", write_jsonl(tmp_path / "m.jsonl", rows)), "all", tokenizer, 50)
    prompt, dialogue = "\n\nHuman: What is tea?\n\nAssistant:", (Message("user", "What is tea?"),)
    assert records == [
        Demonstration("a", prompt, "A drink.", messages=dialogue),
        Demonstration("b", prompt, "A leaf.", messages=dialogue),
    ]


def test_further_columns_of_own_rows_are_metadata(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """All that the format does not use, from both kinds of files."""
    dialogue = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "What?", "response": "It is.", "reference": "x", "tests": ["1", "2"], "answer": 3},
        {"id": "b", "messages": dialogue, "prompt": "old", "response": "other", "tests": [], "answer": None},
    ]
    expected = [
        {"reference": "x", "tests": ["1", "2"], "answer": 3},
        {"prompt": "old", "response": "other", "tests": [], "answer": None},
    ]
    write_jsonl(tmp_path / "m.jsonl", rows)
    columns = [(name, pa.string()) for name in ("id", "prompt", "response", "reference")]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns += [("messages", pa.list_(message)), ("tests", pa.list_(pa.string())), ("answer", pa.int64())]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), tmp_path / "m.parquet")
    for kind in ("jsonl", "parquet"):
        records = read_demonstrations(source("prompts", tmp_path / f"m.{kind}"), "all", tokenizer, 50)
        assert [prompt.metadata for prompt in records] == expected


def test_a_dialogue_stays_whole_where_its_text_is_cut(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says " + "much " * 9} for role in ("user", "assistant", "user")]
    rows = [{"id": "a", "messages": turns, "response": "No."}]
    (record,) = read_demonstrations(source("prompts", write_jsonl(tmp_path / "m.jsonl", rows)), "all", tokenizer, 30)
    assert record.prompt.count("says") == 1 and [m.role for m in record.messages] == ["user", "assistant", "user"]


def test_own_comparisons(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    best, middle, worst = "it is a very good drink", "it is a kind of drink", "it is not a drink, no"
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "What is tea?", "responses": [best, "no", middle, best, worst], "source": "us"},
        {"id": "b", "messages": [{"role": "user", "content": "Tea?"}], "chosen": best, "rejected": worst},
    ]
    comparisons, dropped = read_published(
        source("prompts", write_jsonl(tmp_path / "c.jsonl", rows)), "all", tokenizer, 50
    )
    assert comparisons == [
        Comparison("a", "What is tea?", (best, middle, worst), "us"),
        Comparison("b", "\n\nHuman: Tea?\n\nAssistant:", (best, worst)),
    ]
    assert dropped == {"answers_of_kept_rows": 2}  # out of a row that still has three


def test_labelled_answers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Also as TRL has dialogues. Short answers stay; good ones are demonstrations."""
    question, reply = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": " Yes. "}
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "What is tea?", "completion": " A drink. ", "label": True, "source": "us"},
        {"id": "b", "prompt": "What is tea?", "response": "A car.", "label": 0},
        {"id": "c", "prompt": [question], "completion": [reply], "label": 1},
        {"id": "d", "messages": [question, reply], "label": False},
        {"prompt": "What is tea?", "completion": "A </s>leaf.", "label": False},
        {"prompt": "What is tea?", "completion": "A </s>leaf.", "label": False},
    ]
    path = write_jsonl(tmp_path / "u.jsonl", rows)
    answers, dropped = read_labelled(source("unpaired", path), "all", tokenizer, 50)
    chat = "\n\nHuman: Tea?\n\nAssistant:"
    assert [(a.prompt, a.response, a.good, a.source) for a in answers] == [
        ("What is tea?", "A drink.", True, "us"),
        ("What is tea?", "A car.", False, ""),
        (chat, "Yes.", True, ""),
        (chat, "Yes.", False, ""),
        ("What is tea?", "A leaf.", False, ""),
    ]
    assert answers[0] == LabelledAnswer("a", "What is tea?", "A drink.", True, "us") and dropped == {"duplicate": 1}
    assert read_demonstrations(source("unpaired", path), "all", tokenizer, 50) == [
        Demonstration("a", "What is tea?", "A drink."),
        Demonstration("c", chat, "Yes.", messages=(Message("user", "Tea?"),)),
    ]
    in_parquet = tmp_path / "u.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "label": bool(row["label"])} for row in rows[2:3]]), in_parquet)
    assert read_labelled(source("unpaired", in_parquet), "all", tokenizer, 50)[0] == answers[2:3]


def test_special_tokens_in_data_are_taken_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", tldr_rows(1, post="Now </s>cheap</s>.", summary="Cheap</s> tea."))
    record = read_demonstrations(source("tldr", path), "all", tokenizer, 100)[0]
    assert "POST: Now cheap.\n" in record.prompt and record.response == "Cheap tea."


# ---- validation splits


def test_file_gives_up_a_tenth_for_validation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = tldr_rows(600)
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    train, valid, both = (
        read_demonstrations(source("tldr", path), s, tokenizer, 100) for s in ("train", "valid", "all")
    )
    check_disjoint(train=train, valid=valid)
    assert {d.id for d in train} | {d.id for d in valid} == {d.id for d in both} and len(both) == 600
    assert abs(len(valid) - 60) < 37  # five standard deviations
    write_jsonl(path, rows[::-1])
    assert {d.id for d in read_demonstrations(source("tldr", path), "valid", tokenizer, 100)} == {d.id for d in valid}


def test_carving_keeps_the_answers_to_one_prompt_together(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i // 5}?", "response": f"answer {i}"} for i in range(1000)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    train, valid = (read_demonstrations(source("prompts", path), s, tokenizer, 100) for s in ("train", "valid"))
    assert len(valid) % 5 == 0 and not {d.prompt for d in train} & {d.prompt for d in valid}


def test_directory_without_validation_split_is_carved(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", tldr_rows(100))
    train, valid = (read_demonstrations(source("tldr", tmp_path), s, tokenizer, 100) for s in ("train", "valid"))
    assert len(train) + len(valid) == 100 and len(valid) > 0
    with pytest.raises(UserError, match="no split 'extra'; there are: train; set valid_split"):
        read_demonstrations(source("tldr", tmp_path, valid_split="extra"), "valid", tokenizer, 100)
    with pytest.raises(UserError, match="no split 'extra'; there are: train; set train_split"):
        read_demonstrations(source("tldr", tmp_path, train_split="extra"), "train", tokenizer, 100)


def test_id_in_both_splits_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", tldr_rows(5))
    write_jsonl(tmp_path / "validation.jsonl", tldr_rows(1, id="p3", post="Another."))
    with pytest.raises(
        UserError, match=r"validation.jsonl line 1: id 'p3' is also in training \(.*train.jsonl line 4\)"
    ):
        read_demonstrations(source("tldr", tmp_path), "valid", tokenizer, 100)


def test_text_of_both_splits_without_ids_is_dropped_from_validation(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    best, worst = "it is a very good drink", "it is not a drink, no"
    rows = [{"prompt": f"What is {i}?", "chosen": best, "rejected": worst} for i in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows[:3])
    write_jsonl(tmp_path / "validation.jsonl", rows[2:])
    comparisons, dropped = read_published(source("prompts", tmp_path), "valid", tokenizer, 50)
    assert [c.prompt for c in comparisons] == ["What is 3?"] and dropped == {"in_train": 1}


def test_dropped_demonstrations_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = tldr_rows(3)
    path = write_jsonl(tmp_path / "t.jsonl", [*rows, rows[0], rows[1]])
    found = DataSet(source("tldr", path), Rendering(tokenizer, 100), "demonstration").demonstrations("all")
    assert len(found.records) == 3 and found.dropped == {"duplicate": 2}


# ---- mistakes: one line that says what, where and how to mend it


def test_same_id_with_other_text_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [*tldr_rows(3), *tldr_rows(1, post="Another.")])
    with pytest.raises(UserError, match=r"t.jsonl line 4: id 'p0' was used before \(.*t.jsonl line 1\)"):
        read_demonstrations(source("tldr", path), "all", tokenizer, 100)


GOOD = {"prompt": "What is tea?", "response": "A drink."}


@pytest.mark.parametrize(
    ("format", "rows", "message"),
    [
        ("tldr", tldr_rows(2, post=" "), r"line 1: 'post' is empty"),
        ("tldr", tldr_rows(2, summary=None), r"line 1: 'summary' is empty"),
        ("tldr", tldr_rows(2, summary=7), r"line 1: 'summary' must be text, found int"),
        ("tldr", [GOOD], r"line 1: no column 'title'; there are: prompt, response"),
        ("hh_rlhf", [GOOD], r"line 1: no column 'chosen'; there are: prompt, response"),
        (
            "openai_summarize_tldr",
            [GOOD],
            r"no usable demonstration in split 'all' \(dropped: {'not_a_tldr_post': 1}\)",
        ),
        ("prompts", [GOOD, {"response": "A drink."}], r"line 2: no 'prompt' .text. or 'messages'; there are: response"),
        ("prompts", [GOOD, GOOD | {"prompt": ""}], r"line 2: 'prompt' is empty"),
        ("prompts", [GOOD | {"response": " \n"}], r"line 1: 'response' is empty"),
        ("prompts", [GOOD | {"response": "</s>"}], r"line 1: the response holds nothing but special tokens"),
        ("prompts", [{"prompt": "Tea?"}], r"line 1: no column 'response'; there are: prompt"),
        (
            "prompts",
            [{"messages": [{"role": "me", "content": "a"}]}],
            r"message 1 has the role 'me'; .*: system, ",
        ),
        ("prompts", [{"messages": [{"content": "a"}]}], r"line 1: message 1 needs a role"),
        ("prompts", [{"messages": "Tea?"}], r"line 1: 'messages' must be a list"),
        (
            "prompts",
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            r"line 1: 'messages' must hold a user's turn",
        ),
    ],
)
def test_bad_demonstrations(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, format: str, rows: list[dict[str, Any]], message: str
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        read_demonstrations(source(format, path), "all", tokenizer, 100)
    assert "\n" not in str(error.value) and "bad.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (
            "prompts",
            {"prompt": "Tea?", "responses": ["only one answer in here"]},
            r"'responses' must be a list of at least",
        ),
        ("prompts", {"prompt": "Tea?", "chosen": "a b c d e"}, r"line 1: no column 'rejected'"),
        ("prompts", {"prompt": "Tea?", "chosen": "a", "rejected": "b"}, r"no usable comparison .*nearly_empty"),
        (
            "shp",
            {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 2},
            r"'labels' must be 1 .* found 2",
        ),
    ],
)
def test_bad_comparisons(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, format: str, row: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read_published(source(format, path), "all", tokenizer, 100)


LABELLED = {"prompt": "Tea?", "completion": "Yes.", "label": True}
TURNS = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LABELLED | {"label": "good"}, r"line 1: 'label' must be true .* or false .*, found 'good'"),
        (LABELLED | {"label": None}, r"line 1: 'label' must be true .* or false .*, found None"),
        ({"prompt": "Tea?", "completion": "Yes."}, r"line 1: no column 'label'; there are: prompt, completion"),
        ({"prompt": "Tea?", "label": True}, r"line 1: no column 'completion'; there are: prompt, label"),
        (LABELLED | {"completion": " "}, r"line 1: 'completion' is empty"),
        (LABELLED | {"completion": "</s>"}, r"line 1: the response holds nothing but special tokens"),
        (LABELLED | {"completion": TURNS}, r"line 1: 'completion' must be a text or one message of the assistant"),
        (LABELLED | {"prompt": TURNS}, r"line 1: the dialogue ends with a reply and there is a 'completion', too"),
        (LABELLED | {"prompt": []}, r"line 1: 'prompt' must be a list"),
    ],
)
def test_bad_labelled_answers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError, match=message) as error:
        read_labelled(source("unpaired", path), "all", tokenizer, 100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"\n', r"a.jsonl line 1: not valid JSON"),
        ("a.jsonl", b"\n \n", r"a.jsonl: the file holds no rows"),
        ("a.jsonl", b"[1]\n", r"a.jsonl line 1: expected an object, found list"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n\xff\xfe\x00', r"a.jsonl line 2: not UTF-8 text \(byte 0xff\)"),
        ("a.jsonl.gz", b"not gzip", r"a.jsonl.gz: cannot be read"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', r"a.json: not valid JSON .* into a .jsonl file"),
        ("a.json", b'{"prompt": "a"}', r"a.json: expected an array of objects, found dict"),
        ("a.parquet", b"PAR1nonsense", r"a.parquet: cannot be read"),
        ("a.txt", b"prompt\n", r"a.txt: unknown kind of file; use .parquet, .jsonl"),
    ],
)
def test_bad_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_demonstrations(source("prompts", tmp_path / name), "train", tokenizer, 100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("format", "path", "message"),
    [
        ("tldr", "/nowhere/posts.jsonl", r"/nowhere/posts.jsonl: no such file or directory"),
        ("tldr", "posts.parquet", r"posts.parquet: no such file or directory"),
        ("tldr", "embedded:other", r"there is embedded:tldr"),
        ("tldr", "nobody/no-such-set", r"nobody/no-such-set: cannot be loaded as a data set \(.*check the name"),
        ("tdlr", "embedded:tldr", r"data format 'tdlr' is unknown; there are: tldr, "),
        ("openai_summarize_comparisons", "embedded:tldr", r"holds no demonstrations; those that do: tldr, "),
    ],
)
def test_bad_sources(tokenizer: PreTrainedTokenizerBase, format: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_demonstrations(source(format, path), "train", tokenizer, 100)
    assert "\n" not in str(error.value)


def test_format_without_comparisons(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="'tldr' holds no comparisons; those that do: openai_summarize_comparisons, "):
        read_published(source("tldr", "embedded:tldr"), "train", tokenizer, 100)
    assert all(adapter.prompt or adapter.comparison for adapter in FORMATS.values())


def test_file_too_small_for_a_validation_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD])
    with pytest.raises(
        UserError, match=r"no usable demonstration in split '(train|valid)'.*a train and a validation file"
    ):
        for split in ("train", "valid"):
            read_demonstrations(source("prompts", path), split, tokenizer, 100)
