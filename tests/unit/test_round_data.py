"""Who answers in a round, which prompts are left for it, and which comparisons it learns from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.collect import chosen_prompts, draw_answers
from jobs.reward_model import collected_or_published
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import rank_answers, write_comparisons
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, whose_turn
from rayrlhf.data.records import Demonstration
from rayrlhf.runs.folder import RunFolder


@pytest.mark.parametrize(
    ("shares", "turns"),
    [
        ([1.0], [0, 0, 0, 0, 0, 0, 0, 0]),
        ([1.0, 1.0], [0, 1, 0, 1, 0, 1, 0, 1]),
        ([2.0, 1.0, 1.0], [0, 1, 2, 0, 0, 1, 2, 0]),
        ([3.0, 1.0], [0, 0, 1, 0, 0, 0, 1, 0]),
    ],
)
def test_models_answer_in_turn(shares: list[float], turns: list[int]) -> None:
    assert whose_turn(shares, 8) == turns


def test_every_model_has_its_share_of_all_answers() -> None:
    shares = np.random.default_rng(0).random(5)
    turns = np.array(whose_turn(shares.tolist(), 1000))
    for count in (10, 100, 999):
        had = np.bincount(turns[:count], minlength=5)
        assert (np.abs(had - count * shares / shares.sum()) <= len(shares) - 1).all()


def test_rounds_ask_other_prompts_while_there_are_any() -> None:
    records = [Demonstration(str(i), f"prompt {i}", "response") for i in range(25)]

    def asked(skip: int) -> set[str]:
        own = parse_config({"name": "a", "seed": 3, "collect": {"prompts": 10, "skip_prompts": skip}}, "test")
        found = [record.id for record in chosen_prompts(own, records)]
        assert len(set(found)) == len(found) == 10
        return set(found)

    first, second, third = asked(0), asked(10), asked(20)
    assert not first & second and len((first | second) & third) == 5 and len(first | second | third) == 25
    assert third - (first | second) == {r.id for r in records} - first - second
    assert third & first and not third & second, "those that were asked longest ago come again"


def test_rounds_of_rl_go_on_where_the_one_before_ended() -> None:
    whole = [prompts_of_step(11, 5, step, 4) for step in range(6)]
    in_rounds = [prompts_of_step(11, 5, step, 4, skip=2 * 4 * n) for n in range(3) for step in range(2)]
    assert in_rounds == whole


class Rollouts:
    """Stands for generators: an answer is told by the model that drew it, its prompt, and the seed."""

    def __init__(self) -> None:
        self.model = ""

    def load_weights(self, model: str) -> int:
        self.model = model
        return 0

    def generate(self, prompts: list[Any], draw: Any, version: int, *seed: int | str) -> list[Any]:
        return [(self.model, prompt.id, seed) for prompt in prompts]


def test_the_answers_to_a_prompt_are_shared_out_to_the_models() -> None:
    """Each model draws at once, with a seed of its own, and each answer comes to its place."""

    collect = {"answers_per_prompt": 3, "models": [{"from": "m"}]}
    session: Any = SimpleNamespace(
        config=parse_config({"name": "a", "collect": collect}, "test"),
        rollouts=Rollouts(),
        starts=SimpleNamespace(answering=[("new", 1.0), ("old", 1.0)]),
        data=SimpleNamespace(prompts=lambda records: [EncodedPrompt(record.id, (1,)) for record in records]),
    )
    records = [Demonstration(name, name, "response") for name in "ab"]
    new, old = ("collect",), ("collect", 1)
    drawn: Any = draw_answers(session, records)
    assert drawn == [
        ("new", "a", new), ("old", "a", old), ("new", "a", new),
        ("old", "b", old), ("new", "b", new), ("old", "b", old),
    ]  # fmt: skip


def test_comparisons_of_all_rounds_are_learnt_from_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("round-1", "round-2", "round-3"):
        (tmp_path / name).mkdir()
        made = [
            rank_answers(id=f"{name}{i}", prompt="What?", prompt_ids=[2], responses=["a", "b"], response_ids=[[3], [4]],
                         order=[0, 1], scores=None, labeller="toy", heldout=i == 2)
            for i in range(3)
        ]  # fmt: skip
        write_comparisons(tmp_path / name / "comparisons.parquet", made)
    earlier = [{"path": str(tmp_path / f"round-{n}/comparisons.parquet"), "weight": w} for n, w in ((2, 0.5), (1, 0.0))]
    session: Any = SimpleNamespace(
        config=parse_config({"name": "round-3", "collect": {"earlier": earlier}}, "test"),
        run=RunFolder(tmp_path / "round-3"),
    )
    found: Any = collected_or_published(session, limit=3)
    assert [(c.id, c.source, c.weight, c.heldout) for c in found] == [
        ("round-30", "round-3", 1.0, False), ("round-31", "round-3", 1.0, False), ("round-20", "round-2", 0.5, False),
        ("round-32", "round-3", 1.0, True), ("round-22", "round-2", 1.0, True), ("round-12", "round-1", 1.0, True),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "round-2/comparisons.parquet: 2 prompts to learn from with weight 0.5, 1 held out\n" in out
    assert "round-1/comparisons.parquet: 0 prompts to learn from with weight 0, 1 held out; 2 are unused" in out
