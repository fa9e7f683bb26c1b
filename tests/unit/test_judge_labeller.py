"""A judge as the labeller: rankings from its verdicts, what it cost, how much it looks at the order."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

import jobs.collect
from jobs.collect import collect
from jobs.session import Session, opened
from rayrlhf.config import Config
from rayrlhf.config_file import load_config, parse_config
from rayrlhf.config_labellers import JudgeLabellerConfig
from rayrlhf.data.comparisons import rank_answers, read_ranked
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.rewards.gold import gold_labeller
from rayrlhf.rewards.judge_labeller import JudgeLabeller
from rayrlhf.rewards.labellers import ReferenceLabeller, Unranked, check_labeller, make_labeller
from tests.servers import says
from tests.unit.test_session import config

ROOT = Path(__file__).parents[2]
ANSWERS = ("red wine", "green tea", "cold milk", "hot milk")
TASTE = {"red wine": 2.0, "green tea": 9.0, "cold milk": 5.0, "hot milk": 5.0}
"""Out of 10; the milks are equally good."""
PROMPTS = [Prompt(id, f"What to drink at {id}?") for id in ("noon", "midnight")]


def both(text: str) -> tuple[str, str]:
    """Answers A and B of a question."""
    a, _, b = text.partition("\n\nAnswer B:\n> ")
    return a.rpartition("Answer A:\n> ")[2], b.partition("\n")[0]


def taste(text: str) -> str:
    """An honest judge."""
    a, b = (TASTE[answer] for answer in both(text))
    return "A" if a > b else "B" if b > a else "C"


def stubborn(text: str) -> str:
    """Prefers whatever stands first, except that nothing beats green tea."""
    return "B" if both(text)[1] == "green tea" else "A"


def labeller(url: str, **more: Any) -> JudgeLabeller:
    made = make_labeller(JudgeLabellerConfig(url=url, model="m", rubric="Hydration.", **more))
    assert isinstance(made, JudgeLabeller)
    return made


def shares(verdict: Callable[[str, str], float]) -> list[float]:
    """Oracle: the mean of an answer's value over all questions that it is in."""
    return [
        sum(verdict(own, other) + 1 - verdict(other, own) for other in ANSWERS if other != own) / (2 * 3)
        for own in ANSWERS
    ]


def test_pairs_are_asked_in_both_orders_and_wins_are_counted(serve: Any) -> None:
    server = serve(says(taste))
    judge = labeller(server.url)
    judge.prepare([(prompt, ANSWERS) for prompt in PROMPTS])
    asked = [both(body["messages"][0]["content"]) for _, body in server.asked]
    assert sorted(asked) == sorted(2 * list(permutations(ANSWERS, 2)))
    for prompt in PROMPTS:
        verdict = judge.rank(prompt, ANSWERS)
        assert verdict.scores == pytest.approx(
            shares(lambda a, b: 0.5 if TASTE[a] == TASTE[b] else float(TASTE[a] > TASTE[b]))
        )
        assert verdict.order == (1, 2, 3, 0)
        tokens = [(i,) for i in range(4)]
        ranked = rank_answers(
            id="", prompt="", prompt_ids=(), responses=ANSWERS, response_ids=tokens, order=verdict.order,
            scores=verdict.scores, labeller=judge.name,
        )  # fmt: skip
        assert len(ranked.pairs) == 5, "the milks make no pair"
    assert len(server.asked) == 24, "all were asked before"
    assert judge.facts() == {
        "model": "m", "url": server.url, "compare": "pairs", "questions": 24, "kept": 0, "unusable": 0,
        "tokens": 24 * 7, "pairs": 12, "orders_disagree": 0.0, "first_preferred": 0.5, "longer_preferred": 1.0,
    }  # fmt: skip
    assert judge.measure(PROMPTS[0], "tea") is None


def test_a_judge_that_looks_at_the_order_is_found_out(serve: Any) -> None:
    judge = labeller(serve(says(stubborn)).url)
    verdict = judge.rank(PROMPTS[0], ANSWERS)
    assert verdict.scores == pytest.approx(shares(lambda a, b: float(a == "green tea" or b != "green tea")))
    assert verdict.scores == pytest.approx((2 / 6, 1.0, 2 / 6, 2 / 6)) and verdict.order == (1, 0, 2, 3)
    facts = judge.facts()
    # Of 6 pairs the 3 without tea have two verdicts for the first; of 12 replies 9 are "A": 6 of these, 3 of tea's.
    assert facts["orders_disagree"] == 3 / 6 and facts["first_preferred"] == 9 / 12


def test_a_judge_that_looks_at_the_length_is_found_out(serve: Any) -> None:
    """A pair without a winner over both orders, or with texts of one length, does not count."""

    def brief(text: str) -> str:
        a, b = map(len, both(text))
        return "A" if a < b else "B" if b < a else "C"

    short = labeller(serve(says(brief)).url)
    short.rank(PROMPTS[0], ("a", "bb", "cc", "dddd"))
    assert short.facts()["longer_preferred"] == 0.0
    mixed = labeller(serve(says(lambda text: "C" if "dddd" in text else brief(text))).url)
    mixed.rank(PROMPTS[0], ("a", "bb", "dddd"))
    assert mixed.facts()["longer_preferred"] == 0.0 and mixed.facts()["pairs"] == 3
    blind = labeller(serve(says(lambda text: "A")).url)
    blind.rank(PROMPTS[0], ("a", "bb"))
    assert "longer_preferred" not in blind.facts(), "it has no winner"


def test_a_question_without_a_usable_reply_is_a_tie(serve: Any) -> None:
    def silent_about_wine(text: str) -> str:
        return "Hm." if both(text)[0] == "red wine" else taste(text)

    judge = labeller(serve(says(silent_about_wine)).url)
    verdict = judge.rank(PROMPTS[0], ANSWERS)

    def value(a: str, b: str) -> float:
        return 0.5 if a == "red wine" or TASTE[a] == TASTE[b] else float(TASTE[a] > TASTE[b])

    assert verdict.scores == pytest.approx(shares(value)) and shares(value)[0] == 0.25
    facts = judge.facts()
    assert facts["unusable"] == 3 and facts["tokens"] == (12 + 3) * 7
    assert facts["orders_disagree"] == 0, "of pairs with two verdicts"


def test_answers_are_rated_one_by_one(serve: Any) -> None:
    def rating(text: str) -> str:
        answer = text.partition("\n\nAnswer:\n> ")[2].partition("\n")[0]
        return "Hm." if answer == "cold milk" else f"{TASTE[answer]:.0f}/10"

    server = serve(says(rating))
    judge = labeller(server.url, compare="rate")
    judge.prepare([(PROMPTS[0], ANSWERS)])
    assert len(server.asked) == 4 + 1
    verdict = judge.rank(PROMPTS[0], ANSWERS)
    assert verdict.scores is not None and math.isnan(verdict.scores[2])
    assert (*verdict.scores[:2], verdict.scores[3]) == (0.2, 0.9, 0.5) and verdict.order == (1, 3, 0, 2)
    ranked = rank_answers(
        id="", prompt="", prompt_ids=(), responses=ANSWERS, response_ids=[(i,) for i in range(4)], order=verdict.order,
        scores=verdict.scores, labeller=judge.name,
    )  # fmt: skip
    assert ranked.pairs == ((0, 1), (0, 2), (1, 2)), "the answer without a rating is in none"
    assert "pairs" not in judge.facts() and judge.facts()["unusable"] == 1


def test_what_can_be_checked_is_checked_before_answers_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    section = JudgeLabellerConfig(url="http://127.0.0.1:9/v1", model="m", rubric="r", token_variable="MY_TOKEN")
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UserError, match="collect.labeller .*: the environment variable MY_TOKEN is not set"):
        check_labeller(section)
    monkeypatch.setenv("MY_TOKEN", "secret")
    check_labeller(section)


# ---- the stage


def with_judge(directory: Path, url: str, **more: Any) -> Config:
    """A run whose answers the judge at `url` ranks."""
    section = {"kind": "judge", "url": url, "model": "m", "rubric": "r", **more}
    found = config(directory)
    return found.model_copy(
        update={
            "data": found.data.model_copy(update={"comparisons": None, "reward_model_fraction": 0.3}),
            "collect": found.collect.model_copy(update={"labeller": JudgeLabellerConfig.model_validate(section)}),
        }
    )


def test_collect_ranks_by_the_judge_and_writes_what_it_was_like(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(session: Session, records: Any) -> Any:
        ids = tuple((i,) for i in range(4))
        return [Unranked(record.id, record.prompt, ANSWERS, (5,), ids) for record in records[:2]], {}

    monkeypatch.setattr(jobs.collect, "sample_answers", sampled)
    with opened(with_judge(tmp_path, serve(says(taste)).url), local=True) as session:
        (session.run.sft).mkdir()
        collect(session)
        ranked = read_ranked(session.run.comparisons)
        facts = json.loads(session.run.labeller.read_text())
    assert [r.labeller for r in ranked] == ["judge"] * 2
    assert all(r.responses == ("green tea", "cold milk", "hot milk", "red wine") for r in ranked)
    assert facts["questions"] == 24 and facts["orders_disagree"] == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "24 questions about 2 prompts" in shown
    assert "questions 24, kept 0, unusable 0, tokens 168, pairs 12, orders_disagree 0.0, first_preferred 0.5" in shown
    assert "ranked by 'judge'" in shown


def test_a_judge_is_not_asked_for_the_gold_measure(tmp_path: Path) -> None:
    """Each response of `rl` would be a question to pay for."""
    assert isinstance(gold_labeller(with_judge(tmp_path, "http://a/v1"), Vocabulary()), ReferenceLabeller)


def test_how_a_judge_is_asked_may_change_in_a_run_that_goes_on(tmp_path: Path) -> None:
    """Its checkpoints are found again, unless the judge or its question is another one."""
    settings: list[dict[str, Any]] = [
        {}, {"retries": 9, "concurrency": 1, "timeout_s": 5, "cache": "/tmp/replies"}, {"rubric": "other"},
        {"compare": "rate"},
    ]  # fmt: skip
    names = []
    for more in settings:
        with opened(with_judge(tmp_path, "http://a/v1", **more), local=True) as session:
            names.append(session.checkpoint_name("reward_model"))
    assert names[0] == names[1] and len(set(names)) == 3


def test_the_recipes_of_the_page_are_configs() -> None:
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    recipes = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "kind: judge" in text]
    assert len(recipes) == 2
    labeller, reward = (parse_config({"name": "run"} | yaml.safe_load(text), "page") for text in recipes)
    assert labeller.collect.labeller.kind == "judge" and reward.rewards[0].kind == "judge"


def test_the_command_line_chooses_a_judge_and_says_what_is_wrong_with_one() -> None:
    file, chosen = ROOT / "configs/quickstart.yaml", "collect.labeller.kind=judge"
    given = [f"collect.labeller.{key}" for key in ("url=http://127.0.0.1:8000/v1", "model=m", "rubric=Short.")]
    found = load_config(file, [chosen, *given, "collect.labeller.max_unusable=1e-3"]).collect.labeller
    assert isinstance(found, JudgeLabellerConfig) and found.compare == "pairs" and found.max_unusable == 0.001
    for overrides, said in (
        ([chosen, *given[:2]], "key 'collect.labeller.rubric' is missing"),
        ([chosen, *given, "collect.labeller.compare=all"], "key 'collect.labeller.compare'"),
        ([chosen, *given, "collect.labeller.modle=x"], "unknown key 'collect.labeller.modle'; did you mean 'model'?"),
        (["collect.labeller.kind=oracle"], "key 'collect.labeller.kind': 'oracle' is none of reference, file, python"),
    ):
        with pytest.raises(UserError) as raised:
            load_config(file, overrides)
        assert said in str(raised.value)
