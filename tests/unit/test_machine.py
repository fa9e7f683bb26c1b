"""How a machine is shared out: every division fits it, and what a config gives has precedence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf import config_resources, machine
from rayrlhf.config_file import dump_config, load_config, parse_config
from rayrlhf.config_origins import annotated
from rayrlhf.errors import UserError
from rayrlhf.runs.placement import Node, make_plan, roles_of

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the config find so many cores and GPUs."""

    def pretend(cores: int, gpus: int = 0) -> None:
        monkeypatch.setattr(config_resources, "usable_cores", lambda: cores)
        monkeypatch.setattr(config_resources, "usable_gpus", lambda: gpus)

    return pretend


def resources(**given: Any) -> config_resources.ResourcesConfig:
    return parse_config({"name": "one", "resources": {"auto": True, **given}}, "test").resources


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 64])
def test_every_division_fits_the_machine_and_leaves_no_gpu_idle(machine_of: Any, cores: int, gpus: int) -> None:
    machine_of(cores, gpus)
    found = resources()
    assert make_plan(roles_of(found), [Node("here", cores, gpus)]).complete
    asked = sum(role.count * role.gpus for role in roles_of(found))
    assert asked == pytest.approx(gpus)
    assert all(1 <= role.threads <= cores for role in (found.learner, found.generators, found.scorers))


def test_two_cores_are_shared_out_as_in_the_quick_start(machine_of: Any) -> None:
    machine_of(2)
    ours, quick = resources(), load_config(QUICKSTART).resources
    for role in ("learner", "generators", "scorers"):
        for key in ("cpus", "gpus", "threads"):
            assert getattr(getattr(ours, role), key) == getattr(getattr(quick, role), key), f"{role}.{key}"


def test_eight_gpus_are_shared_out_by_role(machine_of: Any) -> None:
    machine_of(64, 8)
    found = resources(generators={"count": 2, "labels": {"a": "b"}}, dashboard=False)
    assert (found.learner.workers, found.scorers.count) == (4, 1)
    assert (found.generators.count, found.generators.gpus, found.generators.labels) == (2, 1.0, {"a": "b"})


def test_the_chosen_numbers_are_shown_and_stay(machine_of: Any, tmp_path: Path) -> None:
    """In the record of a run, too: another machine that goes on with it does not choose again."""
    machine_of(2)
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nresources: {auto: true}\n")
    shown = annotated(file, ["resources.scorers.threads=1"])
    assert "  learner:\n    cpus: 1.0  # default" in shown and "    threads: 1  # command line" in shown
    chosen = load_config(file)
    machine_of(64, 8)
    assert parse_config(yaml.safe_load(yaml.safe_dump(dump_config(chosen))), "stored") == chosen


def test_without_auto_nothing_is_chosen(machine_of: Any) -> None:
    machine_of(64, 8)
    assert parse_config({"name": "one"}, "test").resources == config_resources.ResourcesConfig()
    with pytest.raises(UserError, match="resources.learner"):
        resources(learner=3)


def test_cores_are_those_of_the_process_and_its_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    quota = machine._quota
    monkeypatch.setattr(machine, "_quota", lambda cgroup: quota(tmp_path))
    for text, cores in (("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("", 16)):
        (tmp_path / "cpu.max").write_text(text)
        assert machine.usable_cores() == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for name, number in (("quota", 400000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{number}\n")
    assert machine.usable_cores() == 4


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-5f0c", 1)])
def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.usable_gpus() == count
