"""What is published arrives bit for bit, through the object store too; what was changed on the way is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import OPTConfig, OPTForCausalLM

from actors.rollouts.weight_sync import Publication, WeightSyncError, load, publish, publish_directory
from rayrlhf.errors import UserError
from rayrlhf.models.layout import lay_out_together


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(37, 11, generator=generator),
        "bfloat16": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "half": torch.randn(7, generator=generator).half(),
        "scalar": torch.tensor(3.5),
        "integers": torch.arange(-4, 5),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(6, 9, generator=generator).t(),
        "large": torch.randn(999, generator=generator),
    }


def _assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(2**20, 1), (1024, 3), (1, 9)])
def test_every_dtype_and_shape_arrives_bit_for_bit(bucket_bytes: int, buckets: int) -> None:
    expected = _tensors()
    publication = publish(expected.items(), 3, local=True, bucket_bytes=bucket_bytes)
    assert publication.version == 3
    assert len(publication.buckets) == len(publication.manifest) == buckets
    _assert_same(dict(load(publication)), expected)


def test_a_publication_does_not_follow_the_parameters() -> None:
    weight = torch.ones(4)
    publication = publish([("weight", weight)], 0, local=True)
    weight.add_(1.0)
    assert dict(load(publication))["weight"].tolist() == [1.0] * 4


def test_parameters_that_require_gradients_can_be_published() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    assert not dict(load(publish([("weight", weight)], 0, local=True)))["weight"].requires_grad


def _swapped(publication: Publication) -> Publication:
    a, b = publication.buckets
    return dataclasses.replace(publication, buckets=(b, a))


def _truncated(publication: Publication) -> Publication:
    a, (b,) = publication.buckets
    return dataclasses.replace(publication, buckets=(a, [b[:-1]]))


def _dropped(publication: Publication) -> Publication:
    return dataclasses.replace(publication, buckets=publication.buckets[:1], manifest=publication.manifest[:1])


def _flipped_bit(publication: Publication) -> Publication:
    a, (b,) = publication.buckets
    b = b.copy()
    b[17] ^= 1
    return dataclasses.replace(publication, buckets=(a, [b]))


def _renamed(publication: Publication) -> Publication:
    (a,), (b,) = publication.manifest
    return dataclasses.replace(publication, manifest=((a._replace(name=b.name),), (b._replace(name=a.name),)))


def _other_version(publication: Publication) -> Publication:
    return dataclasses.replace(publication, version=publication.version + 1)


@pytest.mark.parametrize("harm", [_swapped, _truncated, _dropped, _flipped_bit, _renamed, _other_version])
def test_the_checksum_catches(harm: Any) -> None:
    tensors = {"a": torch.randn(64), "b": torch.randn(64)}
    publication = publish(tensors.items(), 7, local=True, bucket_bytes=256)
    _assert_same(dict(load(publication)), tensors)
    received = load(harm(publication))
    with pytest.raises(WeightSyncError, match=r"weights of version [78].*checksum"):
        next(received)


def test_the_checksum_samples_all_of_a_large_array() -> None:
    publication = publish([("weight", torch.randn(6, 2**20))], 0, local=True)
    ((whole,),) = publication.buckets
    for start in range(0, whole.size, 2**20 + 77):
        other = whole.copy()
        other[start : start + 4096] += 1  # a page of other memory
        with pytest.raises(WeightSyncError):
            next(load(dataclasses.replace(publication, buckets=([other],))))


@pytest.mark.parametrize(("bucket_bytes", "arrays"), [(2**20, [1]), (30_000, [1, 1, 1, 1])])
def test_parameters_that_lie_together_travel_as_one_array(bucket_bytes: int, arrays: list[int]) -> None:
    model = _tiny_model().eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(20).unsqueeze(0)
    logits = model(ids).logits
    lay_out_together(model.parameters(), bucket_bytes)
    _assert_same(dict(model.named_parameters()), before)
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-6, rtol=0.0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(ids).logits.square().mean().backward()
    optimizer.step()
    publication = publish(model.named_parameters(), 1, local=True, bucket_bytes=bucket_bytes)
    assert [len(bucket) for bucket in publication.buckets] == arrays
    _assert_same(dict(load(publication)), dict(model.named_parameters()))
    assert not torch.equal(next(load(publication))[1], next(iter(before.values())))


def test_a_model_that_lies_together_is_saved_whole(tmp_path: Path) -> None:
    model = _tiny_model()
    lay_out_together(model.parameters())
    model.save_pretrained(tmp_path)
    _assert_same(dict(OPTForCausalLM.from_pretrained(tmp_path).named_parameters()), dict(model.named_parameters()))


def _tiny_model() -> OPTForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=200, num_attention_heads=2, max_position_embeddings=64, **size))


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_model_directory_is_published_whole(tmp_path: Path, shard_size: str) -> None:
    model = _tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    got = dict(load(publish_directory(tmp_path, 0, local=True)))
    expected = dict(model.named_parameters())
    _assert_same(dict(sorted(got.items())), dict(sorted(expected.items())))


def test_a_directory_that_lacks_weights_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        publish_directory(tmp_path, 0, local=True)
    _tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: named in model.safetensors.index.json but missing"):
        publish_directory(tmp_path, 0, local=True)


class _Reader:
    """Loads a publication in another process."""

    def read(self, publication: Publication) -> dict[str, Any]:
        return {name: (str(tensor.dtype), tensor.float().numpy().copy()) for name, tensor in load(publication)}


class _Learner:
    """Publishes from another process, and keeps the publication alive as a learner does."""

    def __init__(self) -> None:
        self.publications: list[Publication] = []

    def publish(self, version: int) -> Publication:
        self.publications.append(publish(_tensors().items(), version, local=False, bucket_bytes=1024))
        return self.publications[-1]


@pytest.fixture
def learner(ray_cluster: None) -> Iterator[Any]:
    actor = ray.remote(_Learner).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


def test_through_the_object_store_between_processes(learner: Any) -> None:
    publication = ray.get(learner.publish.remote(5), timeout=600)
    assert all(isinstance(bucket, ray.ObjectRef) for bucket in publication.buckets)
    expected = _tensors()
    _assert_same(dict(load(publication)), expected)

    reader = ray.remote(_Reader).options(num_cpus=0).remote()
    got = ray.get(reader.read.remote(publication), timeout=600)
    assert list(got) == list(expected)
    for name, (dtype, values) in got.items():
        assert dtype == str(expected[name].dtype)
        np.testing.assert_array_equal(values, expected[name].float().numpy())

    a, b, *rest = publication.buckets
    swapped = dataclasses.replace(publication, buckets=(b, a, *rest))
    with pytest.raises(WeightSyncError, match="weights of version 5"):
        next(load(swapped))
    ray.kill(reader)
