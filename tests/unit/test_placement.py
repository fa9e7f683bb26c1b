"""Where actors fit: by hand, and by trying all ways on small clusters."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.config_resources import GeneratorConfig, LearnerConfig, ResourcesConfig
from rayrlhf.runs.placement import Node, Role, demand, make_plan, roles_of


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
