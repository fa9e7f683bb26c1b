"""Losses over pairs against numbers by hand, KTO's mismatched rows, and the config's sections and stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rayrlhf.algorithms.preferences import DPO, IPO, KTO, SimPO, mismatched
from rayrlhf.config import Config
from rayrlhf.config_dpo import DPOConfig, IPOConfig, KTOConfig, SimPOConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.records import Prompt
from rayrlhf.data.splits import split_train
from rayrlhf.errors import UserError
from rayrlhf.runs.stages import STAGES, stages_from, stages_of, stages_to


def loss_of(loss: Any, better: float, worse: float) -> float:
    return float(loss.losses(torch.tensor([better]), torch.tensor([worse])))


def test_losses_by_hand() -> None:
    """Log ratios of 4 and -2 nats, so 6 apart, with beta 0.1; answers of 10 tokens where a loss takes means."""
    assert loss_of(DPO(DPOConfig()), 0.4, -0.2) == pytest.approx(0.437488, abs=1e-6)
    smoothed = 0.9 * math.log1p(math.exp(-0.6)) + 0.1 * math.log1p(math.exp(0.6))
    assert loss_of(DPO(DPOConfig(label_smoothing=0.1)), 0.4, -0.2) == pytest.approx(smoothed)
    assert loss_of(IPO(IPOConfig()), 0.1 * 4 / 10, 0.1 * -2 / 10) == pytest.approx((0.6 - 5.0) ** 2)
    assert loss_of(SimPO(SimPOConfig(target_margin=0.5)), -1.0, -2.5) == pytest.approx(math.log1p(math.exp(-1.0)))
    kto = KTO(KTOConfig(desirable_weight=2.0))
    kto.kl = 3.0
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.3 - 0.4, -0.2 - 0.3)]
    assert loss_of(kto, 0.4, -0.2) == pytest.approx((2 * sigmoid[0] + sigmoid[1]) / 2)
    kto.kl = -3.0  # an estimate may be below 0, the divergence cannot be
    assert loss_of(kto, 0.0, 0.0) == pytest.approx((2 * 0.5 + 0.5) / 2)


def ranked(prompt: int, *answers: int) -> RankedAnswers:
    return RankedAnswers("", "", (prompt,), tuple(map(str, answers)), tuple((a,) for a in answers), None, "")


def test_a_prompt_gets_an_answer_to_another_prompt() -> None:
    """Also where several comparisons follow one another that have the same prompt."""
    comparisons = [ranked(1, 10, 11), ranked(2, 20, 21), ranked(2, 22, 23), ranked(3, 30, 31, 32)]
    assert [row.ids.tolist() for row in mismatched(comparisons)] == [[1, 30], [2, 11], [2, 10], [3, 23]]
    assert [row.mask.tolist() for row in mismatched(comparisons)] == [[False, True]] * 4
    with pytest.raises(UserError, match="loss kto needs two different prompts"):
        mismatched([ranked(2, 20, 21), ranked(2, 22, 23)])


def config(**sections: object) -> Config:
    return parse_config({"name": "one", **sections}, "test")


def names(own: Config) -> list[str]:
    return [stage.name for stage in stages_of(own)]


GIVEN = {"comparisons": {"format": "tldr_comparisons", "path": "file.jsonl"}}
FUNCTION = [{"kind": "python", "name": "mine", "path": "mine.py:score"}]


def test_stages_are_those_that_are_named() -> None:
    wanted = ["sft", "collect", "dpo", "evaluate"]
    own = config(stages=wanted)
    assert names(own) == wanted and stages_to("dpo", own) == wanted[:3]
    assert own.rewards and not own.scored_by and not own.trains_reward_model
    assert "dpo" not in names(config())
    everything = config(stages=list(STAGES))
    assert names(everything) == list(STAGES) and everything.trains_reward_model
    assert names(config(stages=["sft", "dpo"], data=GIVEN)) == ["sft", "dpo"]
    assert stages_from("stages")[0] == "collect" and stages_from("dpo.beta") == ("dpo", "rl", "evaluate")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"stages": ["sft", "rm"]}, "stages"),
        ({"stages": []}, "stages"),
        ({"stages": ["collect", "sft", "dpo"]}, "in this order: sft, collect, reward_model, dpo, rl, evaluate"),
        ({"stages": ["sft", "sft"]}, "name each once"),
        ({"stages": ["collect", "dpo"]}, "sft is missing"),
        ({"stages": ["sft", "dpo"]}, "dpo needs collect, or data.comparisons"),
        ({"stages": ["sft", "reward_model"]}, "reward_model needs collect, or data.comparisons"),
        ({"stages": ["sft", "collect", "dpo"], "data": GIVEN}, "leave out collect"),
        ({"stages": ["sft", "rl"]}, "rl needs reward_model"),
        ({"stages": ["sft", "collect", "reward_model", "rl"], "rewards": FUNCTION}, "leave out reward_model"),
        ({"stages": ["sft", "evaluate"]}, "evaluate needs dpo or rl"),
        (
            {"stages": ["sft", "collect", "dpo", "evaluate"], "evaluate": {"best_of": 4}},
            "evaluate.best_of needs a reward",
        ),
        ({"dpo": {"loss": "orpo"}}, "dpo"),
        ({"dpo": {"loss": "simpo", "label_smoothing": 0.1}}, "label_smoothing"),
        ({"dpo": {"label_smoothing": 0.5}}, "label_smoothing"),
        ({"dpo": {"beta": 0.0}}, "beta"),
    ],
)
def test_what_does_not_fit_is_one_line(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        config(**sections)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_each_loss_has_its_own_defaults() -> None:
    found = {loss: config(dpo={"loss": loss}).dpo for loss in ("dpo", "ipo", "simpo", "kto")}
    assert [type(section) for section in found.values()] == [DPOConfig, IPOConfig, SimPOConfig, KTOConfig]
    assert [section.beta for section in found.values()] == [0.1, 0.1, 2.0, 0.1]
    assert [section.reference for section in found.values()] == [True, True, False, True]
    assert isinstance(config(dpo={"beta": 0.2}).dpo, DPOConfig)


def test_without_rl_its_prompts_are_those_of_the_comparisons() -> None:
    records = [Prompt(f"p{i}", "text") for i in range(300)]
    usual, without_rl = (split_train(records, config().data, rl=rl) for rl in (True, False))
    assert usual.rl and not without_rl.rl and without_rl.sft == usual.sft
    assert {p.id for p in without_rl.reward_model} == {p.id for p in (*usual.reward_model, *usual.rl)}
