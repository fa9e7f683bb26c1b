"""The cache of tokenised records: equal to a reading without it, used again, and never out of date."""

from __future__ import annotations

import datetime
import decimal
import errno
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayrlhf.config_data import DatasetConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data import cache, sources, stored
from rayrlhf.data.files import DataFile, SourceRow
from rayrlhf.data.records import Demonstration, Message
from rayrlhf.data.run_data import RunData
from rayrlhf.data.sources import NO_LIMIT, DataSet, Found, Rendering
from rayrlhf.data.spool import Spool
from rayrlhf.data.stored import Records, write_records
from rayrlhf.data.template import fit_prompts
from rayrlhf.data.tokens import encode_prompt, encode_response
from rayrlhf.errors import UserError
from rayrlhf.files import cache_directory

ROOT = Path(__file__).parents[2]
USED = "; from the cache of tokenised data"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def new_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return new_tokenizer()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which keeps data of any size."""
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEPT_FROM", 1)
    return tmp_path / "cache/records"


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Every fifth prompt comes again, every seventh is long, and one row is there twice."""
    found = [
        {
            "prompt": f"What is {i - (i % 5 == 4)}?" + " long" * 90 * (i % 7 == 0),
            "response": f"It is {i}.",
            "level": i,
            "instruction": "What then?",
            "output": f"That is {i}.",
        }
        for i in range(count)
    ]
    return [*found, found[3]]


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def read(path: Path, tokenizer: PreTrainedTokenizerBase, rendering: Any = None, **keys: Any) -> Found[Demonstration]:
    source = DatasetConfig(**{"path": str(path), "format": "prompts"} | keys)
    return DataSet([source], rendering or Rendering(tokenizer, 40), "demonstration").demonstrations("train")


def whole(records: Any) -> list[tuple[Any, ...]]:
    """All fields, also those that do not count when records are compared."""
    return [astuple(record) for record in records]


def test_what_a_limit_was_chosen_by_is_not_tokenised_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only prompts that are cut are; the records are those of a reading that has no earlier one to take from."""
    monkeypatch.setattr(sources, "_CHUNK", 8)  # several chunks
    path = write(tmp_path / "rows.jsonl", [*rows(), {"prompt": "</s>", "response": "dropped"}])
    expected = read(path, tokenizer)
    shutil.rmtree(directory)
    unlimited = read(path, tokenizer, Rendering(tokenizer, NO_LIMIT))
    long = sum(record.tokens > 40 for record in unlimited.records)
    assert 5 < long < len(unlimited.records) and unlimited.longer == 0

    fitted: list[int] = []

    def counting(tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        fitted.append(len(prompts))
        return fit_prompts(tokenizer, prompts, *rest)

    monkeypatch.setattr(sources, "fit_prompts", counting)
    found = read(path, tokenizer)
    assert whole(found.records) == whole(expected.records) and not found.cached
    assert (found.longer, found.dropped) == (expected.longer, expected.dropped) and found.longer == sum(fitted) == long


def test_what_comes_from_the_cache_is_equal(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, splits and token ids of a run, against a reading that keeps nothing; the files' rows are not read."""
    pairs = [
        {"prompt": f"Why {i}?", "chosen": f"it is {i} of all that there is", "rejected": "nobody here can say it"}
        for i in range(60)
    ]
    config = parse_config({"name": "a", "data": {
        "demonstrations": {"path": str(write(tmp_path / "d.jsonl", rows())), "format": "prompts"},
        "prompts": {"path": str(write(tmp_path / "p.jsonl", rows())), "format": "prompt_only"},
        "comparisons": {"path": str(write(tmp_path / "c.jsonl", pairs)), "format": "preferences"},
        "max_prompt_tokens": 40, "max_response_tokens": 5,
    }}, "test")  # fmt: skip

    def found() -> tuple[list[Any], list[str]]:
        lines: list[str] = []
        data = RunData(config, tokenizer, lines.append)
        data.read()
        shares = (data.train.sft, data.train.rl, data.dev, data.test, data.rl, data.evaluated, data.rl_dev)
        texts = [whole(share) for share in shares]
        return [texts, data.prompts(data.rl), data.responses(data.train.sft), data.comparisons], lines

    monkeypatch.setattr(cache, "KEPT_FROM", 1000)
    plain, said = found()
    assert not list(directory.iterdir()) and not any(USED in line for line in said)
    monkeypatch.setattr(cache, "KEPT_FROM", 1)
    first, _ = found()
    assert len(list(directory.iterdir())) == 6  # three kinds, two splits

    def refuse(self: DataFile) -> Iterator[SourceRow]:
        raise AssertionError("the rows are read again")

    monkeypatch.setattr(DataFile, "rows", refuse)
    again, lines = found()
    assert plain == first == again
    counts = [line for line in said if "; dropped:" in line]
    assert len(counts) == 6 and [line for line in lines if "; dropped:" in line] == [line + USED for line in counts]
    cut = [int(match[1]) for line in counts[:2] if (match := re.search(r"; (\d+) prompts cut", line))]
    assert "dropped: 1 duplicate" in counts[0] and sum(cut) == 9
    # The ids, against each text by itself.
    sft, responses = plain[0][0], plain[2]
    for record, response in zip(sft, responses, strict=True):
        values = Demonstration(*record)
        assert list(values.ids) == encode_prompt(tokenizer, values.text)
        assert list(response) == encode_response(tokenizer, values.response, 5, values.text)


def test_values_keep_their_types(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What Parquet can hold beside the columns that the format knows, and dialogues."""
    columns = {
        "raw": pa.array([b"\0", b""]),
        "parts": pa.array([[{"a": 1}], []]),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "day": pa.array([datetime.date(2020, 1, 2), None]),
        "took": pa.array([datetime.timedelta(days=1, microseconds=3), None]),
        "plain": pa.array([datetime.datetime(2020, 1, 2, 3), None]),
        "there": pa.array([3 * 10**15, None], pa.timestamp("us", "Europe/Vienna")),
        "fine": pa.array([1_577_934_245_000_000_007, None], pa.timestamp("ns", "UTC")),  # of pandas
        "finer": pa.array([1_000_000_007, None], pa.duration("ns")),
    }
    metadata = pa.table(columns).to_pylist()
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    reply = {"role": "assistant", "content": "No."}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["0", "1"], "messages": [turns, [*turns[:1], reply]], **columns}), path)
    for cached in (False, True):
        source = DatasetConfig(path=str(path), format="prompts")
        found = DataSet([source], Rendering(tokenizer, 40), "demonstration").demonstrations("all")
        assert found.cached is cached
        assert [record.metadata for record in found.records] == metadata
        assert [type(value) for value in found.records[0].metadata.values()] == list(map(type, metadata[0].values()))
        assert [record.messages for record in found.records] == [(Message("user", "Tea?"),)] * 2


def test_a_shared_cache_runs_no_code(tmp_path: Path) -> None:
    """Metadata that names anything but values is refused when it is written, and when it is read."""
    harmful = Demonstration("a", "b", "c", metadata={"path": Path("a")})
    with pytest.raises(pickle.UnpicklingError, match="pathlib"):
        write_records(Demonstration, [harmful], tmp_path / "a.arrow")
    with pytest.raises(pickle.UnpicklingError, match=r"posix.system|os.system"):
        stored._unpacked(pickle.dumps(os.system))


Change = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]


def other_tokenizer(**changes: Any) -> Change:
    def change(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        tokenizer = new_tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return {"tokenizer": tokenizer}

    return change


def added_token(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["What is"])
    return {"tokenizer": tokenizer}


def settings(**keys: Any) -> Change:
    return lambda path, monkeypatch: keys


def rendering(*arguments: Any) -> Change:
    return lambda path, monkeypatch: {"rendering": Rendering(new_tokenizer(), *arguments)}


def other_byte(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As long as before, and as old."""
    before, text = path.stat(), path.read_text()
    path.write_text(text.replace("It is 7.", "It is 9.", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    return {}


def other_kind(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"path": shutil.copy(path, path.with_suffix(".ndjson"))}


def other_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(cache, "_code", lambda: "of another version")
    return {}


def other_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(cache, "version", lambda name: f"{name} 99")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        other_byte, other_kind, other_code, other_library, added_token,
        other_tokenizer(chat_template=TEMPLATE), other_tokenizer(eos_token="<pad>"),
        rendering(41), rendering(40, "Be brief."),
        settings(format="alpaca"), settings(columns={"response": "output"}), settings(skip_bad_rows=True),
        settings(weight=0.5), settings(train_split="all"), settings(valid_split="dev"), settings(revision="b"),
        settings(name="c"),
    ],
)  # fmt: skip
def test_whatever_decides_the_records_makes_another_entry(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    assert not read(path, tokenizer).cached and read(path, tokenizer).cached
    changed: dict[str, Any] = {"path": path, "tokenizer": tokenizer} | change(path, monkeypatch)
    assert not read(**changed).cached


def test_every_setting_of_a_source_is_an_ingredient() -> None:
    """A new one has to be tried above."""
    tried = {"path", "format", "columns", "name", "revision", "train_split", "valid_split", "weight", "skip_bad_rows"}
    assert set(DatasetConfig.model_fields) == tried
    assert list(Rendering.__dataclass_fields__) == ["tokenizer", "max_prompt_tokens", "system_prompt"]


def test_a_template_that_writes_the_date(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": f"{i}?"}], "response": "b"} for i in range(20)]
    )
    tokenizer = new_tokenizer()
    found = []
    for date in ("1 May", "1 May", "2 May"):
        tokenizer.chat_template = TEMPLATE.replace("{% if add", "{{ today() }}{% if add")
        tokenizer.apply_chat_template = _dated(tokenizer, date)
        found.append(read(path, tokenizer))
    assert [each.cached for each in found] == [False, True, False]
    assert "2 May" in found[2].records[0].text


def _dated(tokenizer: PreTrainedTokenizerBase, date: str) -> Callable[..., str]:
    plain = type(tokenizer).apply_chat_template
    return lambda messages, **options: plain(tokenizer, messages, today=lambda: date, **options)


def test_the_place_of_a_file_and_the_limit_of_responses_are_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Nor are the shares of the stages."""
    (tmp_path / "elsewhere").mkdir()
    path = write(tmp_path / "a.jsonl", rows())
    copy = shutil.copy(path, tmp_path / "elsewhere/b.jsonl")
    for place, limit, share, used in ((path, 4, 0.4, False), (copy, 7, 0.6, True)):
        lines: list[str] = []
        data = {"demonstrations": {"path": str(place), "format": "prompts"}, "max_prompt_tokens": 40}
        more = {"max_response_tokens": limit, "sft_fraction": share}
        found = RunData(parse_config({"name": "a", "data": data | more}, "test"), tokenizer, lines.append)
        found.read()
        assert all((USED in line) is used for line in lines if "; dropped:" in line)
        whole = [len(encode_response(tokenizer, each.response, 99, each.text)) for each in found.train.sft]
        assert list(map(len, found.responses(found.train.sft))) == [min(limit, length) for length in whole]
        assert max(whole) > 4


def test_two_at_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path) -> None:
    """Both have written before one of them is first; the other's records stay readable."""
    record = Demonstration("a", "b", "c", ids=(1, 2), response_ids=((3,),))
    with cache.working_directory() as one, cache.working_directory() as two:
        opened = []
        for each in (one, two):
            write_records(Demonstration, [record], each / cache.RECORDS)
            opened.append(Records.open(Demonstration, each / cache.RECORDS))
        assert cache.keep(one, "key", {"dropped": {}}) and cache.keep(two, "key", {"dropped": {}})
    assert [each.name for each in directory.iterdir()] == ["key"]
    assert [whole(each) for each in opened] == [whole([record])] * 2
    found = cache.read_entry(Demonstration, "key")
    assert found is not None and whole(found[0]) == whole([record]) and found[1] == {"dropped": {}}


@pytest.mark.parametrize("name", ["records.arrow", "facts.json"])
def test_a_damaged_entry_is_made_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path, name: str
) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    before = whole(read(path, tokenizer).records)
    (entry,) = directory.iterdir()
    damaged = (entry / name).read_bytes()[:-9]
    (entry / name).unlink()
    (entry / name).write_bytes(damaged)
    found = read(path, tokenizer)
    assert not found.cached and whole(found.records) == before
    assert read(path, tokenizer).cached


def test_a_cache_that_cannot_be_written_is_done_without(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / "a.jsonl", rows())
    assert [read(path, tokenizer).cached for _ in range(2)] == [False, False]


def test_a_cache_that_may_only_be_read_is_used(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    before = whole(read(path, tokenizer).records)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "another user's")

    monkeypatch.setattr("rayrlhf.data.cache.os.utime", refused)
    found = read(path, tokenizer)
    assert found.cached and whole(found.records) == before and len(list(directory.iterdir())) == 1


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a number."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("RAYRLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "rayrlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path(tempfile.gettempdir()) / f"rayrlhf-{os.getuid()}"


def test_a_full_disk_is_one_line_that_says_where(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    with monkeypatch.context() as context:
        context.setattr("rayrlhf.data.cache.RECORDS", "/dev/full")
        with pytest.raises(UserError, match=r"records: no space is left on its disk; .*RAYRLHF_CACHE=DIR"):
            read(path, tokenizer)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as context:  # the records had room, what is beside them has not
        context.setattr("rayrlhf.data.cache.sync_tree", full)
        assert not read(path, tokenizer).cached and not list(directory.iterdir())
    with Path("/dev/full").open("r+b") as device, monkeypatch.context() as context:
        context.setattr("rayrlhf.data.spool.tempfile.SpooledTemporaryFile", lambda _: device)
        with pytest.raises(UserError, match=r"no space is left on its disk; .*TMPDIR=DIR"):
            read(write(tmp_path / "b.jsonl", rows(1100)), tokenizer)


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    plain = DataFile.rows

    def changing(self: DataFile) -> Iterator[SourceRow]:
        yield from plain(self)
        path.write_text(path.read_text() + "\n")

    monkeypatch.setattr(DataFile, "rows", changing)
    read(path, tokenizer)
    assert not list(directory.iterdir())


def test_what_nobody_uses_is_deleted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, directory: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", rows(60 + i)) for i in range(3)]
    entries: list[Path] = []
    for path in paths[:2]:
        read(path, tokenizer)
        (entry,) = set(directory.iterdir()) - set(entries)
        entries.append(entry)
        os.utime(entry, (0, 0))
    assert read(paths[1], tokenizer).cached  # in use again
    read(paths[2], tokenizer)
    assert not entries[0].exists() and entries[1].exists() and len(list(directory.iterdir())) == 2


def test_some_records_of_a_file(tmp_path: Path) -> None:
    """Any choice of them over several batches, as a list has it."""
    given = [
        Demonstration(f"i{i}", f"t{i}", f"r{i}", ids=tuple(range(i % 7)), response_ids=(tuple(range(i % 3)),))
        for i in range(2 * stored.ROWS + 5)
    ]
    write_records(Demonstration, given, tmp_path / "a.arrow")
    records = Records.open(Demonstration, tmp_path / "a.arrow")
    for piece in (slice(None), slice(3, 2000, 7), slice(None, None, -1), slice(5, 5)):
        assert whole(records[piece]) == whole(given[piece])
        assert records[piece].lengths().tolist() == [len(record.response_ids[0]) for record in given[piece]]
        assert list(records[piece].column("text")) == [record.text for record in given[piece]]
    places = (0, stored.ROWS - 1, stored.ROWS, 2 * stored.ROWS + 4, -1)
    assert whole(records[place] for place in places) == whole(given[place] for place in places)
    assert pickle.loads(pickle.dumps(records[2:4])) == given[2:4]


def test_a_spool_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.data.spool._IN_MEMORY", 1)
    spool, given = Spool(), [(f"row {i}", {"n": i}) for i in range(2500)]
    assert [spool.add(item) for item in given] == list(range(2500))
    assert [spool[i] for i in reversed(range(2500))] == given[::-1] and len(spool) == 2500
