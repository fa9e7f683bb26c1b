"""How machines are shared out: every division fits them, and what a config gives has precedence."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf import config_origins, machine
from rayrlhf.config_file import dump_config, load_config, parse_config
from rayrlhf.config_origins import annotated
from rayrlhf.config_resources import ResourcesConfig
from rayrlhf.errors import UserError
from rayrlhf.machine import Machine, cache_for
from rayrlhf.runs.placement import Node, make_plan, roles_of

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
GIB = 2**30


def chosen(*machines: tuple[int, int], **given: Any) -> ResourcesConfig:
    """The section for machines of so many cores and GPUs."""
    section = parse_config({"name": "one", "resources": {"auto": True, **given}}, "test").resources
    return section.shared_among([Machine(*each, GIB) for each in machines])


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 64])
def test_every_division_fits_the_machine_and_leaves_no_gpu_idle(cores: int, gpus: int) -> None:
    found = chosen((cores, gpus))
    assert make_plan(roles_of(found), [Node("here", cores, gpus)]).complete
    asked = sum(role.count * role.gpus for role in roles_of(found))
    assert asked == pytest.approx(gpus)
    assert all(1 <= role.threads <= cores for role in (found.learner, found.generators, found.scorers))


@pytest.mark.parametrize(
    ("machines", "counts"),  # learner workers, generators, scorers
    [
        ([(8, 4), (8, 4)], (4, 3, 1)),  # the learner on one machine
        ([(8, 8), (8, 8)], (8, 7, 1)),
        ([(16, 0), (8, 4), (4, 1)], (2, 2, 1)),  # the first is a head without GPUs
        ([(2, 1), (2, 1)], (1, 1, 1)),
        ([(4, 1), (4, 1), (4, 1)], (1, 1, 1)),
        ([(2, 4), (64, 4)], (4, 3, 1)),  # half a core for each actor, on the first one
        ([(4, 0)] * 3, (3, 3, 3)),
        ([(2, 0), (16, 0), (16, 0)], (2, 2, 2)),  # the small one is left out
    ],
)
def test_a_cluster_is_shared_out(machines: list[tuple[int, int]], counts: tuple[int, int, int]) -> None:
    found = chosen(*machines)
    assert (found.learner.workers, found.generators.count, found.scorers.count) == counts
    nodes = [Node(f"node{i}", cores, gpus) for i, (cores, gpus) in enumerate(machines)]
    plan = make_plan(roles_of(found), nodes)
    assert plan.complete
    if found.learner.gpus:
        assert len(plan.placed["learner"]) == 1, "gradients stay on one machine"
    else:
        assert {*plan.placed["learner"].values()} == {1}, "a learner takes all cores of its machine while it is at work"


def test_two_cores_are_shared_out_as_in_the_quick_start() -> None:
    ours, quick = chosen((2, 0)), load_config(QUICKSTART).resources
    for role in ("learner", "generators", "scorers"):
        for key in ("cpus", "gpus", "threads"):
            assert getattr(getattr(ours, role), key) == getattr(getattr(quick, role), key), f"{role}.{key}"


def test_eight_gpus_are_shared_out_by_role() -> None:
    found = chosen((64, 8), generators={"count": 2, "labels": {"a": "b"}}, dashboard=False)
    assert (found.learner.workers, found.scorers.count) == (4, 1)
    assert (found.generators.count, found.generators.gpus, found.generators.labels) == (2, 1.0, {"a": "b"})


def test_the_cache_has_what_it_needs_or_a_quarter_of_the_memory() -> None:
    one, other, unknown = Machine(2, 0, GIB), Machine(2, 0, 2 * GIB), Machine(2, 0, math.inf)
    assert cache_for([one], 1, 100) == cache_for([unknown], 9, 100) == 100
    assert cache_for([one], 1, 10**6) == cache_for([one, other], 2, 10**6) == 256, "of 1 GiB"
    assert cache_for([one], 3, 10**6) == 85 and cache_for([other, other], 3, 10**6) == 256, "two on one of them"
    assert cache_for([Machine(2, 0, 0.0)], 1, 100) == 1


def test_auto_is_the_default_where_no_role_is_named() -> None:
    def resources(given: dict[str, Any]) -> ResourcesConfig:
        return parse_config({"name": "one", "resources": given}, "test").resources

    assert parse_config({"name": "one"}, "test").resources.auto and resources({"dashboard": False}).auto
    named = resources({"scorers": {"threads": 2}})
    assert not named.auto and named.shared_among([Machine(64, 8, GIB)]) == named
    assert not resources({"auto": False}).auto and resources({"auto": True, "learner": {"workers": 2}}).auto
    with pytest.raises(UserError, match="resources.learner"):
        resources({"learner": 3})


def test_the_chosen_numbers_are_shown_and_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_origins, "this_machine", lambda: Machine(2, 0, GIB))
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nresources: {auto: true}\ndata: {max_prompt_tokens: auto}\n")
    shown = annotated(file, ["resources.scorers.threads=1"])
    assert "  learner:\n    cpus: 1.0  # auto, for this machine" in shown and "    threads: 1  # command line" in shown
    assert f"  max_prompt_tokens: auto  # {file}:3" in shown and "  max_response_tokens: auto  # default" in shown
    monkeypatch.setattr(config_origins, "this_machine", lambda: Machine(64, 8, GIB))
    (tmp_path / "all.yaml").write_text(shown)
    kept = load_config(tmp_path / "all.yaml")
    assert kept.resources.shared_among([Machine(64, 8, GIB)]) == kept.resources and kept.resources.learner.workers == 1
    assert kept.data.to_choose == ("max_prompt_tokens", "max_response_tokens")
    assert shown.count("  micro_batch_tokens: auto  # default") == 5
    assert kept.sft.to_choose == kept.resources.scorers.to_choose == ("micro_batch_tokens",)
    assert "kv_cache_mib: auto  # default" in shown and kept.resources.generators.to_choose == ("kv_cache_mib",)
    assert parse_config(yaml.safe_load(yaml.safe_dump(dump_config(kept))), "stored") == kept


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


def test_memory_is_what_is_left_of_the_container_s_limit(tmp_path: Path) -> None:
    assert machine._left_of_limit(tmp_path) == math.inf
    for name, bytes in (("limit", 900), ("usage", 300)):
        (tmp_path / "memory").mkdir(exist_ok=True)
        (tmp_path / "memory" / f"memory.{name}_in_bytes").write_text(f"{bytes}\n")
    assert machine._left_of_limit(tmp_path) == 600
    (tmp_path / "memory" / "memory.stat").write_text("cache 250\ninactive_file 9\ntotal_inactive_file 200\n")
    assert machine._left_of_limit(tmp_path) == 800, "the kernel forgets files that were read"
    (tmp_path / "memory" / "memory.stat").unlink()
    (tmp_path / "memory.current").write_text("90")
    (tmp_path / "memory.stat").write_text("anon 70\ninactive_file 20\n")
    for text, left in (("100", 30), ("max", 600)):
        (tmp_path / "memory.max").write_text(text)
        assert machine._left_of_limit(tmp_path) == left
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  2 kB\n")
    assert machine._available(tmp_path / "meminfo") == 2048
    assert machine._available(tmp_path / "nowhere") == math.inf


def test_the_smallest_gpu_s_memory_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.memory_of_gpus() == 16 * GIB, "no driver says"
    for said, bytes in (("81559 40960", 40 * GIB), ("[N/A]", 16 * GIB)):
        command = tmp_path / "nvidia-smi"
        command.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said.split()))
        command.chmod(0o755)
        assert machine.memory_of_gpus() == bytes


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-5f0c", 1)])
def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.usable_gpus() == count
