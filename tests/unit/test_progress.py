"""The numbers a person plans with: batch arithmetic by hand, ETA by a hand-wound clock, lines that stay lines."""

import io

import pytest
from rich.console import Console, RenderableType

from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.reports.progress import Progress, StageLoad, batch_table, duration, sample_panel, stage_loads, step_line
from rayrlhf.reports.tables import evaluation_table


def render(thing: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def config(**sections: object) -> Config:
    data = {"max_prompt_tokens": 100, "max_response_tokens": 28}
    return parse_config({"name": "one", "data": data, **sections}, "test")


def test_stage_loads_by_hand() -> None:
    given = config(
        sft={"epochs": 3, "batch_size": 32, "micro_batch_tokens": 1024, "max_demonstrations": 100},
        collect={"prompts": 200, "answers_per_prompt": 4, "include_reference": True, "heldout_fraction": 0.1},
        reward_model={"prompts_per_batch": 16, "micro_batch_tokens": 1000},
        rl={"steps": 10, "prompts_per_step": 30, "samples_per_prompt": 2, "epochs": 4, "minibatches": 2,
             "micro_batch_tokens": 512},
        evaluate={"max_prompts": 50},
        resources={"learner": {"workers": 2}},
    )  # fmt: skip
    assert stage_loads(given, n_sft=1000, n_prompts=700, n_comparisons=None, n_test=80) == [
        # 100 records / 32 = 4 steps x 3 epochs; 16 rows a worker, 1024 // 128 = 8 rows a pass
        StageLoad("sft", 100, 32, 32, 12, 2, 32 * 128),
        StageLoad("collect", 200, 200, 800, None, None, 800 * 128),
        # 180 train prompts / 16 = 12 steps; 16 x 5 rows, 40 a worker, 1000 // 128 = 7 rows a pass
        StageLoad("reward_model", 180, 16, 80, 12, 6, 80 * 128),
        # 60 samples, mini-batches of 30, 15 a worker, 512 // 128 = 4 rows a pass
        StageLoad("rl", 700, 30, 60, 80, 4, 60 * 128),
        StageLoad("evaluate", 50, 50, 100, None, None, 100 * 128),
    ]


def test_given_comparisons_replace_the_collect_stage() -> None:
    loads = {load.stage: load for load in stage_loads(config(), 10, 10, n_comparisons=33, n_test=5)}
    assert list(loads) == ["sft", "reward_model", "rl", "evaluate"]
    assert loads["reward_model"].optimiser_steps == 3
    assert loads["sft"].samples_a_step == 10  # fewer records than the batch size
    assert loads["reward_model"].samples_a_step == 32
    loads = {load.stage: load for load in stage_loads(config(), 10, 10, n_comparisons=33, n_test=5, answers=1.2)}
    assert loads["reward_model"].samples_a_step == 20  # 16 prompts of 1.2 answers are 19.2


def test_what_is_collected_is_no_more_than_there_are_prompts() -> None:
    loads = {load.stage: load for load in stage_loads(config(), 10, 10, None, 5, n_collect=60)}
    assert (loads["collect"].records, loads["collect"].samples_a_step) == (60, 240)
    assert loads["reward_model"].records == 51  # 85 % of them
    assert stage_loads(config(), 10, 10, None, 5, n_collect=999) == stage_loads(config(), 10, 10, None, 5)


def test_a_pass_holds_at_least_one_row() -> None:
    loads = stage_loads(config(sft={"micro_batch_tokens": 5}), 64, 10, None, 5)
    assert loads[0].micro_batches == 32


def test_batch_table_shows_the_numbers() -> None:
    text = render(
        batch_table(config(rl={"steps": 7, "prompts_per_step": 64}), 5000, 900, None, 80, parameters=(0, 2**27))
    )
    assert "run one" in text
    assert "448 samples in all" in text
    assert "4.00 GiB" in text  # 2 models x 16 bytes x 2^27
    with_lora = render(batch_table(config(), 5000, 900, parameters=(2**27, 2**20)))
    assert "1,048,576 parameters are trained and 134,217,728 are frozen" in " ".join(with_lora.split())
    assert "1.03 GiB" in with_lora  # 2 models x (4 bytes x 2^27 + 16 bytes x 2^20)
    given = render(batch_table(config(), 5000, 900, parameters=(0, 2**27), given={"taste": 3 * 2**30}))
    # Reference policy and trained reward model with 4 bytes x 2^27 each, and the one from elsewhere.
    assert "scorer: about 4.00 GiB each (reference policy, reward model, taste)" in " ".join(given.split())
    row = next(line for line in text.splitlines() if "rl" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["rl", "900", "64", "64", "28", "2", "8,192"]


def test_a_stage_of_few_steps_is_said_to_learn_hardly_anything() -> None:
    """Tried with 82 demonstrations: three steps, after which the model wrote what it had written before."""

    def told(n_sft: int, n_comparisons: int, **sections: object) -> str:
        return " ".join(render(batch_table(config(**sections), n_sft, 900, n_comparisons)).split())

    text = told(82, 97)
    assert "sft: 82 records make 3 optimiser steps, which hardly change a model; sft.epochs=3 sft.batch_size=12" in text
    assert "would make 21." in text and "reward_model.prompts_per_batch=4 would make 25." in text
    better = {"sft": {"epochs": 3, "batch_size": 12}, "reward_model": {"prompts_per_batch": 4}}
    assert "hardly" not in told(82, 97, **better) and "hardly" not in told(5000, 900)
    assert "sft.batch_size=10 would make 27." in told(82, 900, resources={"learner": {"workers": 5}})


def test_step_line_of_ppo() -> None:
    metrics = {
        "rl/score/mean": 0.12345,
        "rl/reward/mean": 0.1,
        "rl/kl": 1.5,
        "rl/length/mean": 31.25,
        "rl/eos_rate": 0.75,
        "rl/policy_loss": -0.01,
        "rl/value_loss": None,
        "time/step": 12.3,
        "time/generate": 4.1,
        "time/learn": 6.0,
        "throughput/tokens_per_s": 1234.5,
    }
    assert step_line("rl", 3, 20, metrics, eta_s=200) == (
        "rl  3/20  score 0.123  reward 0.100  KL 1.500 nats  length 31.2  EOS 75%  "
        "policy loss -0.0100  value loss n/a  12.3 s (generate 4.1, learn 6.0)  1,234 tok/s  ETA 3 min 20 s"
    )
    assert step_line("sft", 1, 5, {"sft/loss": 2.0, "sft/lr": 1e-4}) == "sft 1/5  loss 2.0000  lr 1.00e-04"
    assert step_line("reward_model", 1, 5, {"reward_model/loss": float("nan")}) == "reward_model 1/5  loss n/a"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-3, "0 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_eta_counts_only_the_steps_of_this_process() -> None:
    now = [100.0]
    out = io.StringIO()
    progress = Progress("rl", total=20, done=10, console=Console(file=out, width=40), clock=lambda: now[0])
    assert progress.eta_s is None
    now[0] += 30.0
    progress.update(11, {"rl/kl": 1.0})
    assert progress.eta_s == pytest.approx(9 * 30.0)
    now[0] += 10.0
    progress.update(12, {"rl/kl": 1.0, "rl/length/mean": 30.0, "time/step": 10.0})
    assert progress.steps_per_s == pytest.approx(2 / 40)
    assert progress.eta_s == pytest.approx(8 * 20.0)
    lines = out.getvalue().splitlines()
    assert lines == [
        "rl 11/20  KL 1.000 nats  ETA 4 min 30 s",
        "rl 12/20  KL 1.000 nats  length 30.0  10.0 s  ETA 2 min 40 s",  # longer than the width, one line
    ]


def test_sample_panel_shows_text_as_it_is() -> None:
    text = render(sample_panel("POST: [bold]I am 5[/bold] [/oops]\n", " ref", "", title="step [3]"))
    for part in ("[bold]I am 5[/bold] [/oops]", "reference: ref", "answer: (empty)", "step [3]"):
        assert part in text
    assert "reference" not in render(sample_panel("POST", None, "x"))


def test_a_panel_shows_a_long_text_whole() -> None:
    """Also on a console that breaks no lines, as that of the commands."""
    out = io.StringIO()
    words = [f"word{i}" for i in range(60)]
    Console(file=out, width=60, soft_wrap=True).print(sample_panel(" ".join(words), "ü" * 100, "ÿ" * 200))
    shown = out.getvalue()
    assert [word for word in shown.split() if word.startswith("word")] == words
    assert (shown.count("ü"), shown.count("ÿ")) == (100, 200)


def test_evaluation_table_shows_pairs_with_their_tests() -> None:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.5, "high": mean + 0.25, "n": 9}

    result = {
        "sft": {"reward": interval(0.5), "gold": None},
        "policy": {"reward": interval(1.5), "gold": None, "gold_lc_win_rate_vs_sft": interval(0.6)},
        "differences": {
            "policy_minus_sft": {
                "reward": {**interval(1.0), "p": 0.0002},
                "length": {**interval(12.0), "p": 0.04},
                "gold": None,
            },
            "policy_minus_sft_at_equal_length": {"reward": interval(0.75), "gold": None},
        },
        "metadata": {"prompts": 9, "data": "test split"},
    }
    lines = [" ".join(line.split()) for line in render(evaluation_table(result)).splitlines()]
    assert "gold_lc_win_rate_vs_sft – 0.600 [0.100, 0.850]" in lines
    pairs = lines[lines.index("policy minus SFT on the same prompts") :]
    assert "reward 1.000 [0.500, 1.250] p < 0.001 0.750 [0.250, 1.000]" in pairs
    assert "length 12.0 [11.5, 12.2] p = 0.040 –" in pairs
    assert not any(line.startswith("gold") for line in pairs)
    del result["differences"]
    assert "policy minus SFT" not in render(evaluation_table(result))
