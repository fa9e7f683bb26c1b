"""`rayrlhf init`: its config is valid, its comments are true, and nothing is overwritten."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rayrlhf.config_file import load_config
from rayrlhf.data.files import SourceRow
from rayrlhf.data.formats import FORMATS, recognise
from rayrlhf.data.reading import Source
from rayrlhf.errors import UserError
from rayrlhf.starter import FILES, write_starter


@pytest.mark.parametrize(
    ("folder", "name"), [("mine", "mine"), ("my posts", "my-posts"), ("2026", "2026"), ("true", "true"), ("_", "mine")]
)
def test_the_config_is_valid_and_named_after_the_folder(tmp_path: Path, folder: str, name: str) -> None:
    paths = write_starter(tmp_path / folder)
    assert [path.name for path in paths] == list(FILES)
    assert load_config(paths[0]).name == name
    assert f"runs/{name}" in paths[1].read_text()


def test_rows_as_its_comments_say_are_recognised(tmp_path: Path) -> None:
    config_file, _ = write_starter(tmp_path / "mine")
    text = config_file.read_text()
    rows = [json.loads(row) for row in re.findall(r"^ *# +(\{\".*\})$", text, re.MULTILINE)]
    demonstrations = [
        row for row in rows if "response" in row or row.get("messages", [{}])[-1].get("role") == "assistant"
    ]
    comparisons = [row for row in rows if row not in demonstrations]
    assert len(demonstrations) == len(comparisons) == 2
    file = tmp_path / "demonstrations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    (data,) = load_config(config_file, [f"data.demonstrations.path={file}"]).data.demonstrations
    own = Source.open(data, "demonstration")
    assert own.name == "prompts" and own.format.demonstration is not None
    assert [own.format.demonstration(row).response for row in own.rows.train] == ["...", "..."]
    compare = FORMATS[
        recognise("comments", [SourceRow("comment", row) for row in comparisons], ["comparison"])
    ].comparison
    assert compare is not None
    for row in comparisons:
        assert len(compare(SourceRow("comment", row)).responses) == 2


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: exists already"):
        write_starter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        write_starter(tmp_path / "file")
