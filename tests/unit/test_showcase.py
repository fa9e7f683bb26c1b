"""`make showcase` without its model: the openings, the lexicon as the labeller, and which answers are shown.

`e2e/test_showcase` runs it with the model.
"""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config_file import load_config
from rayrlhf.data.records import Prompt
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.rewards.gold import gold_labeller
from rayrlhf.rewards.labellers import make_labeller

ROOT = Path(__file__).parents[2]
OPENINGS, ANSWERS, MODEL = (
    runpy.run_path(str(ROOT / f"scripts/{name}.py")) for name in ("make_openings", "showcase_answers", "showcase_model")
)


@pytest.mark.parametrize(
    ("post", "wanted"),
    [
        ("My mom works as a principal for middle schoolers.", ("My mom works as a principal for", "middle schoolers.")),
        ("So we went out, and then, later, we ate.", ("So we went out, and then, later", "we ate.")),
        ("I'm glad of the rain that fell\n\n  all night.", ("I'm glad of the rain that fell", "all night.")),
        ("I " + "am " * 40, ("I am am am am am am", " ".join(["am"] * 24))),
        ("The old cat sleeps on the warm radiator all day.", None),  # of no author
        ("I am here. You are there, it seems to me.", None),  # ends a sentence
        ("I bought 3 pounds of tea for my aunt yesterday.", None),  # a number
        ("i bought a pound of tea for my aunt.", None),
        ("Hello, I bought a pound of tea for my aunt.", None),
        ("I bought this for Redditors who like my tea.", None),
        ("I see [my page](example) of tea and some more.", None),
        ("My tea is cold and I wait", None),  # nothing follows
    ],
)
def test_an_opening_is_the_plain_beginning_of_a_sentence_of_its_author(
    post: str, wanted: tuple[str, str] | None
) -> None:
    assert OPENINGS["opening"](post) == wanted


def test_openings_are_the_same_each_time_and_none_is_for_both_training_and_test(tmp_path: Path) -> None:
    found = {}
    for name in ("one", "two"):
        subprocess.run([sys.executable, ROOT / "scripts/make_openings.py", tmp_path / name], check=True)
        found[name] = {file.name: file.read_text() for file in sorted((tmp_path / name).iterdir())}
    assert found["one"] == found["two"] and list(found["one"]) == ["train.jsonl", "validation.jsonl"]
    train, valid = ([json.loads(line) for line in text.splitlines()] for text in found["one"].values())
    assert (len(train), len(valid)) == (1034, 173)
    for key in ("id", "prompt"):
        values = [row[key] for row in (*train, *valid)]
        assert len(set(values)) == len(values), key


def test_the_labeller_is_the_lexicon_as_it_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hutto and Gilbert 2014: the sum s of the words' valences becomes s / sqrt(s^2 + 15); negation is a factor -0.74.

    The lexicon has 2.7 for happy, -2.1 for sad and 1.9 for good.
    """
    monkeypatch.chdir(ROOT)  # a relative path starts where the command does
    config = load_config(ROOT / "configs/showcase.yaml")
    ranked, gold = make_labeller(config.collect.labeller), gold_labeller(config, Vocabulary())
    prompt = Prompt(id="a", text="I think that my terrible, awful dog")  # whose words do not count
    answers = ["is sad", "is not happy", "is here", "is happy", "is good, happy"]
    sums = [-2.1, -0.74 * 2.7, 0.0, 2.7, 4.6]
    wanted = [s / math.sqrt(s * s + 15) for s in sums]
    verdict = ranked.rank(prompt, answers)
    assert verdict.scores == pytest.approx(wanted, abs=1e-4)  # VADER rounds to four places
    assert verdict.order == (4, 3, 2, 1, 0)
    assert gold is not None and [gold.measure(prompt, text) for text in answers] == list(verdict.scores or ())


def test_rl_is_told_nothing_of_the_lexicon() -> None:
    config = load_config(ROOT / "configs/showcase.yaml")
    assert [(reward.kind, reward.trained) for reward in config.rewards] == [("model", True)]


def rows(gains: list[float]) -> list[dict[str, Any]]:
    return [
        {"id": f"{i:02}", "post": f"p{i}", "sft": "a\nb", "policy": "c|d", "gold_sft": 0.25, "gold_policy": 0.25 + gain}
        for i, gain in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("gains", "shown"),
    [
        ([0.5, 0.25, 1.0, 0.75], [0.25, 0.5, 0.75, 1.0]),  # one in each quarter
        ([8, 1, 7, 2, 6, 3, 5, 4], [2, 4, 6, 8]),  # the upper one of two
        (list(range(12)), [1, 4, 7, 10]),  # the middle one of three
        ([-1.0, 0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_answers_from_each_quarter_of_the_gains_are_shown(gains: list[float], shown: list[float]) -> None:
    found = ANSWERS["picked"](rows(gains)[::-1])
    assert [row["gold_policy"] - row["gold_sft"] for row in found] == shown
    assert len({row["id"] for row in found}) == len(found)


def test_the_table_of_the_document_has_a_line_for_each_prompt() -> None:
    assert ANSWERS["markdown"](rows([0.5])).splitlines() == [
        "| opening | before (SFT) | after (policy) | gold |",
        "| --- | --- | --- | --- |",
        "| p0 | a b | c\\|d | +0.25 → +0.75 |",
    ]


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/showcase_answers.py"), str(ROOT / "configs/showcase.yaml")]
    result = subprocess.run([*command, f"runs_dir={tmp_path}"], capture_output=True, text=True)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith(f"error: {tmp_path}/showcase/samples.parquet: no such file; ")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL["gguf_file"].__globals__, "NEEDED", ("json", "no_such_module"))
    with pytest.raises(SystemExit, match="^error: no_such_module not installed; `make showcase` installs"):
        MODEL["gguf_file"]()


def test_a_directory_that_holds_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, str(ROOT / "scripts/showcase_model.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith(f"error: {tmp_path} is there and holds no model; ")
    assert (tmp_path / "mine.txt").read_text() == "mine"
