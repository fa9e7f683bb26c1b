"""Where actors fit: by hand, and by trying all ways on small clusters."""

from __future__ import annotations

import itertools
import shlex
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import cluster
from rayrlhf.config_file import parse_override, parse_section, set_key
from rayrlhf.config_resources import GeneratorConfig, LearnerConfig, ResourcesConfig
from rayrlhf.errors import UserError
from rayrlhf.runs.placement import Node, Role, demand, make_plan, roles_of, smaller


def role(
    name: str = "generators",
    count: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    together: bool = False,
    **labels: str,
) -> Role:
    return Role(name, count, cpus, gpus, labels, together)


NODES = [Node("a", 4, 0), Node("b", 4, 0), Node("c", 4, 0)]


def test_learners_are_kept_together_and_rollouts_spread() -> None:
    plan = make_plan([role("learner", 3, together=True), role("generators", 3), role("scorers", 2)], NODES)
    assert plan.complete
    assert plan.placed["learner"] == {"a": 3}
    assert plan.placed["generators"] == {"a": 1, "b": 1, "c": 1}
    assert plan.placed["scorers"] == {"b": 1, "c": 1}


def test_labels_keep_rollouts_off_the_learners_nodes() -> None:
    nodes = [Node("big", 64, 8, {"role": "learner"}), Node("small", 2, 0, {"role": "generator"})]
    plan = make_plan([role("learner", together=True, role="learner"), role(count=3, role="generator")], nodes)
    assert plan.placed["generators"] == {"small": 2} and plan.missing(plan.roles[1]) == 1
    assert not plan.complete


def test_shares_of_a_gpu_are_of_one_gpu() -> None:
    one = [Node("a", 9, 1)]
    three = [role("learner", gpus=0.4), role("generators", gpus=0.4), role("scorers", gpus=0.2)]
    assert make_plan(three, one).complete
    assert not make_plan([role(count=3, gpus=0.6)], [Node("a", 9, 2)]).complete, "1.8 GPUs of 2, but none has room"
    # 0.5 and 0.5 go to one GPU, so that another one is whole.
    assert make_plan([role("x", 2, gpus=0.5), role("y", gpus=1)], [Node("a", 9, 2)]).complete
    assert not make_plan([role(gpus=2)], [Node("a", 9, 1), Node("b", 9, 1)]).complete


def test_runs_at_a_time_ask_for_as_much() -> None:
    roles = [role("learner", together=True), role()]
    assert make_plan(roles, NODES, runs=6).complete
    plan = make_plan(roles, NODES, runs=7)
    assert [plan.missing(r) for r in plan.roles] == [0, 2]
    bundles, labels = demand(plan)
    assert bundles == [{"CPU": 1.0}] * 14 and labels == [{}] * 14


def test_an_autoscaler_is_asked_for_what_the_config_says() -> None:
    resources = ResourcesConfig(
        learner=LearnerConfig(workers=2, gpus=1, labels={"role": "learner"}), generators=GeneratorConfig(cpus=0)
    )
    bundles, labels = demand(make_plan(roles_of(resources), []))
    assert bundles == [{"CPU": 1.0, "GPU": 1.0}] * 2 + [{"CPU": 1.0}]  # generators ask for nothing, scorers for a CPU
    assert labels == [{"role": "learner"}] * 2 + [{}]


@pytest.mark.parametrize("gpus", [1.5, 2.25])
def test_a_share_of_several_gpus_is_refused(gpus: float) -> None:
    with pytest.raises(ValueError, match="a share of one GPU, or a whole number"):
        GeneratorConfig(gpus=gpus)


sizes = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3), st.integers(1, 4), sizes, sizes)
def test_like_actors_fit_whenever_they_can(nodes: list[tuple[int, int]], count: int, cpus: int, gpus: int) -> None:
    """One role of whole CPUs and GPUs: complete exactly if some way to place it exists."""
    plan = make_plan([role(count=count, cpus=cpus, gpus=gpus)], [Node(str(i), *n) for i, n in enumerate(nodes)])

    def fits(way: tuple[int, ...]) -> bool:
        return all(k * cpus <= nodes[i][0] and k * gpus <= nodes[i][1] for i, k in Counter(way).items())

    assert plan.complete == any(map(fits, itertools.product(range(len(nodes)), repeat=count)))
    assert fits(tuple(int(name) for name in plan.placed["generators"].elements()))


# ---- what to set


@pytest.mark.parametrize(
    ("roles", "nodes", "words"),
    [
        # Fewer generators, as many as there is room for.
        ([role("learner", together=True), role(count=64), role("scorers")], NODES, "resources.generators.count=10"),
        # On two cores and on one GPU, three roles with a whole one each: shares of 0.9^7 and of 0.9^11.
        (
            [role("learner", cpus=2, together=True), role(), role("scorers")],
            [Node("a", 2, 0)],
            "resources.learner.cpus=0.95 resources.generators.cpus=0.47 resources.scorers.cpus=0.47",
        ),
        (
            [role("learner", cpus=0, gpus=1, together=True), role(cpus=0, gpus=1), role("scorers", cpus=0, gpus=1)],
            [Node("a", 2, 1)],
            "resources.learner.gpus=0.31 resources.generators.gpus=0.31 resources.scorers.gpus=0.31",
        ),
        # No label, no GPU: nothing smaller fits.
        ([role(role="generator")], NODES, ""),
        ([role(gpus=1)], NODES, ""),
        ([role(gpus=8)], [Node("a", 64, 4)], ""),
    ],
)
def test_what_to_set_is_what_fits(roles: list[Role], nodes: list[Node], words: str) -> None:
    assert smaller(roles, nodes) == shlex.split(words)


@settings(max_examples=50, deadline=None)
@given(
    nodes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=3),
    counts=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    cpus=st.lists(st.floats(0.5, 4), min_size=3, max_size=3),
    runs=st.integers(1, 2),
)
def test_a_config_with_these_settings_fits(
    nodes: list[tuple[int, int]], counts: list[int], cpus: list[float], runs: int
) -> None:
    """They are read as a config reads them, and placed by the plan."""
    machines = [Node(f"n{i}", *size) for i, size in enumerate(nodes)]
    sizes = [{key: n, "cpus": c} for key, n, c in zip(("workers", "count", "count"), counts, cpus, strict=True)]
    tree = dict(zip(("learner", "generators", "scorers"), sizes, strict=True))
    before = roles_of(parse_section(ResourcesConfig, tree, "test"))
    for word in smaller(before, machines, runs):
        key, value = parse_override(word)
        set_key(tree, key.removeprefix("resources."), value, word)
    after = roles_of(parse_section(ResourcesConfig, tree, "test"))
    assert make_plan(after, machines, runs).complete or after == before


# ---- on a shared cluster


def test_a_run_waits_for_what_other_jobs_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the third look the other job has ended, or it never does. A second is one look here."""
    clock = itertools.count()
    left = iter([[Node("a", 0.5, 0)], [Node("a", 0.5, 0)], [Node("a", 2, 0)]])
    monkeypatch.setattr(cluster, "cluster_nodes", lambda free: next(left))
    passing = SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda seconds: None)
    monkeypatch.setattr(cluster, "time", passing)  # not that of threads of other tests
    roles = [role("learner", together=True), role()]
    plan = cluster._wait_for_others(roles, 1, limit_s=30)
    assert plan.placed == {"learner": {"a": 1}, "generators": {"a": 1}}
    assert capsys.readouterr().out == "waiting for other jobs (1 of 30 s): 1 learner, 1 generators fit nowhere\n"
    monkeypatch.setattr(cluster, "cluster_nodes", lambda free=False: [Node("a", 1, 0)])
    with pytest.raises(UserError, match=r"1 generators fit nowhere after 30 s; .*: resources\.start_timeout_s=300$"):
        cluster._wait_for_others(roles, 1, limit_s=30)
    assert len(capsys.readouterr().out.splitlines()) == 2, "a line every 15 s"
