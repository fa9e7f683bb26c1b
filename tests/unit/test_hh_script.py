"""scripts/hh_reward_model.py: folds without a dialogue on both sides, and the pooled table."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayrlhf.reports.measures import SCORERS

ROOT = Path(__file__).parents[2]
HH = ROOT / "tests" / "data" / "hh_harmless_small.jsonl.gz"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "hh_reward_model.py"))


def opening(row: dict[str, str]) -> str:
    return row["chosen"].split("\n\nAssistant:")[0].strip()


def test_every_pair_is_held_out_once_and_no_dialogue_is_on_both_sides(script: Any, tmp_path: Path) -> None:
    given = [json.loads(line) for line in gzip.decompress(HH.read_bytes()).splitlines()]
    twin = {"chosen": given[0]["chosen"], "rejected": given[0]["rejected"] + " indeed"}
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*given, twin]))
    script["write_folds"](data, 3, 0, tmp_path)
    heldout: list[str] = []
    for k in (1, 2, 3):
        train, valid = (
            [json.loads(line) for line in (tmp_path / f"fold-{k}" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "validation")
        )
        assert len(train) + len(valid) == len(given) + 1 and len(valid) > 0
        assert not {opening(row) for row in train} & {opening(row) for row in valid}
        assert not {row["id"].split(":")[0] for row in train} & {row["id"].split(":")[0] for row in valid}
        heldout += [row["chosen"] + row["rejected"] for row in valid]
    assert sorted(heldout) == sorted(row["chosen"] + row["rejected"] for row in [*given, twin])


def test_folds_are_pooled_by_dialogue(script: Any) -> None:
    margins = {name: [1.0, -1.0] for name in SCORERS if name != "reward_model"}
    one = pa.table({"id": ["0.1:1", "0.1:2"], "reward_model": [3.0, 1.0], **margins})
    two = pa.table({"id": ["0.7:3", "0.9:4"], "reward_model": [-0.1, 0.2], **margins})
    lines = script["pooled_table"]([one, two])
    assert lines[0] == "4 held-out pairs of 3 dialogues, 2 folds."
    rows = {cells[1].strip(): cells[2:-1] for line in lines if len(cells := line.split("|")) > 3}
    assert rows["reward model"][0].split()[0] == "0.750" and rows["reward model"][1].strip() == "–"
    assert rows["longer answer"][0].split()[0] == "0.500" and rows["longer answer"][1].split()[0] == "0.250"
    assert lines[-1] == "Reward model by fold: 1.000, 0.500."


def test_usage_counts_every_pair(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pairs = len(gzip.decompress(HH.read_bytes()).splitlines())
    text = script["usage_of"](HH, ["data.max_response_tokens=4"])
    used, dropped = int(text.split(" used")[0].split()[-1]), int(text.split(" used, ")[1].split()[0])
    assert text.startswith(f"{pairs} pairs in the file, ") and used + dropped == pairs and dropped > 0
    assert "equal_after_cutting" in text
    cut = float(text.split("of the replies")[0].split()[-1].rstrip("%")) / 100
    assert 0.8 < cut <= 1.0 and np.isfinite(cut)
