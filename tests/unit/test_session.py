"""What a session says about the data it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.session import opened
from rayrlhf.config import parse_config


def test_published_comparisons_count_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also pairs that differ only behind `max_response_tokens`, where both answers are cut."""
    same = "the first words of both of these two answers are equal and many "
    rows = [{"prompt": f"What is {i}?", "chosen": "it is a good drink", "rejected": "it is no drink, no"} for i in "ab"]
    rows.append({"prompt": "Why is it?", "chosen": same + "yes", "rejected": same + "no"})
    rows.append({"prompt": "Who is it?", "chosen": "it is too short", "rejected": "it is not short at all"})
    for name in ("train", "validation"):
        lines = [json.dumps(row | {"id": f"{name}{i}"}) for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"comparisons": {"format": "prompts", "path": str(tmp_path)}, "max_response_tokens": 8},
    }
    with opened(parse_config(settings, "test"), local=True) as session:
        found = session.published_comparisons
    assert [r.id for r in found if not r.heldout] == ["train0", "train1"]
    said = capsys.readouterr().out.splitlines()
    expected = f"comparisons from {tmp_path}; dropped: 1 equal_when_cut, 1 nearly_empty"
    assert said[0] == f"2 train {expected}"
