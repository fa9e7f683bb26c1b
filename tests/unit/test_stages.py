"""The table of stages agrees with the functions, the config, the reports and the documents that go by its names."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import get_args

import pytest

from jobs.pipeline import STAGE_FUNCTIONS
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.config_stages import StageName
from rayrlhf.reports.measures import PANELS
from rayrlhf.reports.progress import batch_table, has_step_line, stage_loads
from rayrlhf.runs.stages import STAGES, stages_from, stages_of, stages_to

GIVEN = {"data": {"comparisons": {"format": "tldr_comparisons", "path": "file.jsonl"}}}


def config(**sections: object) -> Config:
    return parse_config({"name": "one", **sections}, "test")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_function_of_its_name_with_a_section_of_its_name(name: str) -> None:
    function = getattr(importlib.import_module(f"jobs.{name}"), name)
    assert list(inspect.signature(function).parameters) == ["session"] and function.__doc__
    assert STAGE_FUNCTIONS[name] is function
    assert name in Config.model_fields
    assert STAGES[name].name == name


def test_a_stage_needs_only_stages_before_it_and_no_two_have_one_output() -> None:
    names = list(STAGES)
    for stage in STAGES.values():
        read = [*stage.starts_from, *stage.needs]
        assert all(names.index(needed) < names.index(stage.name) for needed in read)
        assert stage.output_is_directory is not bool(Path(stage.output).suffix)
    assert len({stage.output for stage in STAGES.values()}) == len({stage.command for stage in STAGES.values()}) == 6


def test_what_trains_has_a_line_and_curves() -> None:
    trained = [name for name, stage in STAGES.items() if stage.trains]
    assert list(get_args(StageName)) == list(STAGES)
    assert set(PANELS) == {*trained, "rl_eval"}  # the evaluations during `rl`
    for name in trained:
        assert any(has_step_line(name, {measure.name: 1.0}) for panel in PANELS[name] for measure in panel.measures)


@pytest.mark.parametrize(("sections", "n_comparisons"), [({}, None), (GIVEN, 50), ({"stages": list(STAGES)}, None)])
def test_the_loads_are_those_of_the_runs_stages(sections: dict[str, object], n_comparisons: int | None) -> None:
    own = config(**sections)
    loads = stage_loads(own, n_sft=100, n_prompts=100, n_comparisons=n_comparisons, n_test=10)
    assert [load.stage for load in loads] == [stage.name for stage in stages_of(own)]
    assert batch_table(own, 100, 100, n_comparisons).row_count == len(loads)


def test_given_comparisons_leave_one_stage_out() -> None:
    assert [stage.name for stage in stages_of(config())] == ["sft", "collect", "reward_model", "rl", "evaluate"]
    assert [stage.name for stage in stages_of(config(**GIVEN))] == ["sft", "reward_model", "rl", "evaluate"]


def test_the_stages_up_to_one_and_those_that_a_key_goes_into() -> None:
    assert stages_to("reward_model", config()) == ["sft", "collect", "reward_model"]
    assert stages_from("reward_model.optimizer.lr") == ("reward_model", "dpo", "rl", "evaluate")
    assert stages_from("model.path") == stages_from("seed") == tuple(STAGES)
