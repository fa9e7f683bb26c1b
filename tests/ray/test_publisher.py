"""What a publisher sends: complete weights of a model with and without adapters, and how much of it travels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import PreTrainedModel

from actors.rollouts.publisher import AdapterPublication, Publisher
from actors.rollouts.weight_sync import Publication, WeightSyncError
from rayrlhf.config import LoRAConfig
from rayrlhf.models.loading import load_policy, resolve_model
from rayrlhf.models.lora import add_adapters, merged_state, trained_state

TINY = resolve_model("embedded:opt-tiny")


def adapted() -> PreTrainedModel:
    model = load_policy(TINY)
    add_adapters(model, LoRAConfig(rank=4), seed=0)
    return model


def train(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in trained_state(model).values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


def assert_serves(publication: Publication | AdapterPublication, expected: dict[str, torch.Tensor]) -> None:
    got = dict(publication.tensors())
    assert got.keys() == {name for name in expected if name != "lm_head.weight"}  # tied to the embedding
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7, msg=name)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("local", [True, False])
def test_each_version_of_adapters_arrives_merged_and_the_rest_travels_once(local: bool) -> None:
    model = adapted()
    publisher = Publisher(model, local=local)
    publications = []
    for version in (1, 2):
        train(model, version)
        publication = publisher.publish(version)
        assert isinstance(publication, AdapterPublication) and publication.version == version
        publications.append((publication, merged_state(model)))
    train(model, 3)  # publications do not follow
    first, second = publications
    assert first[0].frozen is second[0].frozen
    for publication, expected in publications:
        assert_serves(publication, expected)
    sent = sum(array.nbytes for bucket in second[0].factors.buckets for array in (bucket if local else ray.get(bucket)))
    parameters = sum(tensor.numel() for tensor in trained_state(model).values())
    assert 4 * parameters <= sent < 4 * parameters * 1.02  # alignment
    assert sent < 0.1 * 4 * sum(p.numel() for p in model.parameters())


def test_without_adapters_all_weights_are_sent() -> None:
    model = load_policy(TINY)
    publication = Publisher(model, local=True).publish(1)
    assert isinstance(publication, Publication)
    assert_serves(publication, model.state_dict())


@pytest.mark.parametrize("part", ["frozen", "factors"])
def test_a_flipped_bit_is_refused_before_the_first_tensor(part: str) -> None:
    model = adapted()
    train(model, 1)
    publication = Publisher(model, local=True).publish(1)
    assert isinstance(publication, AdapterPublication)
    whole: Publication = getattr(publication, part)
    arrays = [np.array(array) for array in whole.buckets[0]]
    arrays[0][5] ^= 1
    broken = dataclasses.replace(whole, buckets=(arrays, *whole.buckets[1:]))
    changes: dict[str, Any] = {part: broken}
    with pytest.raises(WeightSyncError, match="checksum"):
        next(iter(dataclasses.replace(publication, **changes).tensors()))
