"""`rayrlhf config`: the output is the same config, and each value says where it was set."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.config_file import load_config, parse_override
from rayrlhf.config_origins import annotated, origins
from rayrlhf.errors import UserError
from rayrlhf.sweeps.plan import load_sweep

ROOT = Path(__file__).parents[2]
MINE = """\
name: mine
rl:
  steps: 3
  optimizer: {lr: 2.0e-4, betas: [0.9, 0.999]}
resources:
  generators:
    labels: {rayrlhf.io/role: generator}
"""


def origin(text: str) -> dict[str, str]:
    """The comment behind each line `key: value`, by the line without it."""
    lines = [line.partition("  # ") for line in text.splitlines() if "  # " in line]
    return {line.strip(): comment for line, _, comment in lines}


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_output_is_the_same_config_as_the_input(tmp_path: Path, config: Path) -> None:
    overrides = ["seed=7", "rl.kl={coefficient: 0.1}", "resources.scorers.labels={rayrlhf.io/role: generator}"]
    (tmp_path / "all.yaml").write_text(annotated(config, overrides))
    assert load_config(tmp_path / "all.yaml") == load_config(config, overrides)
    again = origin(annotated(tmp_path / "all.yaml", []))
    assert "default" not in again.values(), "the output has every key"


def test_each_value_says_where_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    found = origin(annotated(file, ["rl.steps=5", "sft.epochs=2"]))
    assert found["name: mine"] == f"{file}:1"
    assert found["seed: 0"] == "default"
    assert found["steps: 5"] == "command line", "the later one"
    assert found["epochs: 2"] == "command line"
    assert found["betas: [0.9, 0.999]"] == f"{file}:4"
    assert found["rayrlhf.io/role: generator"] == f"{file}:7"


def test_an_override_of_a_section_replaces_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nrl:\n  kl: {coefficient: 0.2, target: 5.0}\n")
    found = origins(file, ["rl.kl={coefficient: 0.1}"])
    assert found["rl", "kl", "coefficient"] == "command line"
    assert ("rl", "kl", "target") not in found
    assert "target: 6.0  # default" in annotated(file, ["rl.kl={coefficient: 0.1}"])


def test_keys_of_a_yaml_merge_have_the_line_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nsft:\n  optimizer: &base\n    lr: 1.0e-4\n    eps: 1.0e-6\n"
        "rl:\n  optimizer:\n    <<: *base\n    lr: 2.0e-4\n"
    )
    found = origins(file, [])
    assert found["rl", "optimizer", "eps"] == f"{file}:5"
    assert found["rl", "optimizer", "lr"] == f"{file}:9"


def test_mistakes_are_those_of_every_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        annotated(tmp_path / "nowhere.yaml", [])
    with pytest.raises(UserError, match="unknown key 'rl.stepz'"):
        annotated(ROOT / "configs" / "quickstart.yaml", ["rl.stepz=1"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("runs_dir=runs/My runs #1", "runs/My runs #1"),
        ("name=2024-11-05", "2024-11-05"),
        ("model.revision=1234567", "1234567"),
        ("model.revision=null", None),  # which the key may be
        ("data.demonstrations.path=a: b #c.jsonl", "a: b #c.jsonl"),
        ("model.path='quoted #1'", "quoted #1"),
        ('name="0x10"', "0x10"),
        ("rl.steps=3", 3),
        ("data.stop_tokens=[a, '#']", ["a", "#"]),
        ("collect.labeller.path=yes", "yes"),
        ("rl.kl={coefficient: 0.1}", {"coefficient": 0.1}),
        ("no.such.key=2024", 2024),
    ],
)
def test_text_is_taken_as_it_stands(override: str, value: object) -> None:
    assert parse_override(override) == (override.partition("=")[0], value)


def test_a_sweeps_own_text(tmp_path: Path) -> None:
    sweep = ROOT / "configs" / "sweeps" / "quickstart_ppo.yaml"
    assert load_sweep(sweep, ["name=2024-11-05", "data.demonstrations.path=my #1.jsonl"]).settings.name == "2024-11-05"
