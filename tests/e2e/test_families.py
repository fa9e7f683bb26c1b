"""`rayrlhf run` on what people bring: six shapes of data by four families of models, with configs of a few lines.

python -m pytest -m long tests/e2e/test_families.py                    # each data set with one family
python -m pytest -m long tests/e2e/test_families.py --every-family     # all 24
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.runs.stages import STAGES
from tests.shapes import DATA_SETS, FAMILIES

PAIRS = list(itertools.product(DATA_SETS, FAMILIES))
DIAGONAL = [(data, [*FAMILIES][i % len(FAMILIES)]) for i, data in enumerate(DATA_SETS)]
"""Every data set once; the first four have a family each."""


# A run each, of a minute.
@pytest.mark.long
@pytest.mark.parametrize(("data", "family"), PAIRS, ids=map("-".join, PAIRS))
def test_a_config_of_a_few_lines_goes_through_all_stages(
    start: Any, tmp_path: Path, pytestconfig: pytest.Config, data: str, family: str
) -> None:
    if (data, family) not in DIAGONAL and not pytestconfig.getoption("--every-family"):
        pytest.skip("runs with --every-family")
    model = tmp_path / "model"
    model.mkdir()
    FAMILIES[family](model)
    text = f"name: mine\nruns_dir: {tmp_path}\nmodel: {{path: {model}}}\n{DATA_SETS[data](tmp_path)}"
    text += "rl: {steps: 2, prompts_per_step: 8}\n"
    assert len(text.splitlines()) <= 8
    (tmp_path / "mine.yaml").write_text(text)

    outcome = start("rayrlhf", "run", str(tmp_path / "mine.yaml")).wait()

    assert outcome.code == 0 and outcome.err == "", outcome.out[-3000:] + outcome.err
    assert "Traceback" not in outcome.out
    run = tmp_path / "mine"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    lengths = {key: stored["data"][key] for key in ("max_prompt_tokens", "max_response_tokens")}
    assert all(f"data.{key}={length} (" in outcome.out for key, length in lengths.items())
    assert "resources, by 1 machine with" in outcome.out and stored["resources"]["auto"]
    expected = stored["stages"] or [
        stage for stage in STAGES if stage != "dpo" and not (stage == "collect" and stored["data"]["comparisons"])
    ]
    assert re.findall(r"^(\w+): done in", outcome.out, re.MULTILINE) == expected
    evaluation = json.loads((run / "evaluation.json").read_text())
    for source in ("sft", "policy"):
        assert math.isfinite(evaluation[source]["reward"]["mean"])
        assert 1 <= evaluation[source]["length"]["mean"] <= lengths["max_response_tokens"]
