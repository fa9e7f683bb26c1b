"""Losses against numbers by hand, KTO's mismatched rows and balance, and the config's sections and stages."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from rayrlhf.algorithms.preferences import DPO, IPO, KTO, LabelledKTO, SimPO, mismatched
from rayrlhf.algorithms.ranking import Measured
from rayrlhf.config import Config
from rayrlhf.config_dpo import DPOConfig, IPOConfig, KTOConfig, SimPOConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.labelled import LabelledAnswers
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


def test_labelled_answers_by_hand() -> None:
    """Three prompts with answers of 1, 2 and 0 good ones; z is 0.1 * 3 nats."""
    kto = LabelledKTO(KTOConfig(desirable_weight=2.0, undesirable_weight=0.5))
    kto.kl = 3.0
    labels = ((True, False), (True, True), (False,))
    comparisons = [LabelledAnswers("", (1,), ((3,),) * len(own), own) for own in labels]
    judged = kto.judge(torch.tensor([0.4, -0.2, 0.1, 0.3, 0.5]), comparisons)
    good = sum(2.0 / (1 + math.exp(s - 0.3)) for s in (0.4, 0.1, 0.3))
    bad = sum(0.5 / (1 + math.exp(0.3 - s)) for s in (-0.2, 0.5))
    assert float(judged.loss) == pytest.approx(good + bad)
    margins, better, worse = (torch.cat(side).tolist() for side in zip(*judged.prompts, strict=True))
    assert margins == pytest.approx([0.1, 0.5, -0.2, 0.0, -0.2], abs=1e-6)
    assert better == pytest.approx([0.4, 0.1, 0.3]) and worse == pytest.approx([-0.2, 0.5])
    assert [len(prompt.margins) for prompt in judged.prompts] == [2, 2, 1]


def test_accuracy_of_labelled_answers_is_that_of_both_sides() -> None:
    """A policy that raises all nine answers, of which eight are good, is right about all good ones and no bad one."""
    kto = LabelledKTO(KTOConfig())
    raised, none = torch.full((8,), 0.5), torch.zeros(0)
    found = kto.details(Measured(0.0, none, raised, torch.tensor([0.75]), []))
    assert found == {
        "accuracy": 0.5, "margin": -0.25, "reward/chosen": 0.5, "reward/rejected": 0.75, "accuracy/chosen": 1.0,
        "accuracy/rejected": 0.0, "kl": 0.0,
    }  # fmt: skip
    kto.kl = 2.5  # z is 0.25, which stands for the side that a batch does not have
    found = kto.details(Measured(0.0, none, raised, none, []))
    assert found == {"accuracy": 1.0, "margin": 0.25, "reward/chosen": 0.5, "accuracy/chosen": 1.0, "kl": 2.5}
    assert kto.details(Measured(0.0, none, none, raised, []))["margin"] == -0.25


@pytest.mark.parametrize(
    ("good", "bad", "weights", "said"),
    [
        (100, 100, {}, None),
        (133, 100, {}, None),
        (135, 100, {}, "are 1.35 to 1; .*: set dpo.undesirable_weight between 1.01 and 1.35"),
        (900, 100, {}, "900 good answers of weight 1 and 100 bad ones of weight 1 are 9 to 1; .* between 6.75 and 9"),
        (900, 100, {"undesirable_weight": 8.0}, None),
        (100, 400, {}, "are 0.25 to 1; .*: set dpo.desirable_weight between 4 and 5.33"),
        (100, 400, {"desirable_weight": 2.0, "undesirable_weight": 0.5}, None),
        (7, 0, {}, "all 7 answers to train on are good; bad ones"),
        (0, 7, {}, "all 7 answers to train on are bad; good ones"),
    ],
)
def test_what_is_said_of_the_balance(good: int, bad: int, weights: dict[str, float], said: str | None) -> None:
    """Section 4.2 of the paper: lambda_D n_D / (lambda_U n_U) in [1, 4/3]. The weights that are advised are in it."""
    line = KTOConfig.model_validate(weights).balance(good, bad)
    assert (line is None) if said is None else (line is not None and re.search(said, line))
    if line and (advised := re.search(r"set dpo\.(\w+) between (\S+) and (\S+)", line)):
        inside = (float(advised[2]) + float(advised[3])) / 2
        assert KTOConfig.model_validate(weights | {advised[1]: inside}).balance(good, bad) is None
    assert DPOConfig().balance(good, bad) is None


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
