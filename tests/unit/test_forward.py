"""Running a model over rows: order, shared batches, and what a sharded model needs of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rayrlhf.data.rows import Row
from rayrlhf.models.batching import collate
from rayrlhf.models.forward import RootModule
from rayrlhf.models.logprobs import sequence_scores, token_logprobs, token_values
from tests.tiny import PAD, forward_of, random_trajectories, tiny_models

ROWS = [Row.completion(t.prompt_ids, t.response_ids) for t in random_trajectories([(3, 5), (9, 2), (4, 8), (2, 6)])]


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_results_come_in_the_order_of_the_rows(max_tokens: int) -> None:
    policy, scorer = (forward_of(model, max_tokens) for model in tiny_models())
    logprobs, scores = policy.row_logprobs(ROWS, 0.7), scorer.row_scores(ROWS)
    for row, of_row, score in zip(ROWS, logprobs, scores, strict=True):
        alone = collate([row], PAD)
        torch.testing.assert_close(of_row, token_logprobs(policy.model, alone, 0.7).detach(), rtol=1e-5, atol=1e-5)
        assert score == pytest.approx(float(sequence_scores(scorer.model, alone).detach()), rel=1e-4, abs=1e-5)
        assert not of_row.requires_grad


def test_batches_are_packed_only_if_every_model_that_shares_them_can() -> None:
    policy, value_model = (forward_of(model) for model in tiny_models())
    value_model.packed = False
    ((_, alone),) = policy.batches(ROWS)
    ((_, shared),) = policy.batches(ROWS, beside=[value_model])
    assert alone.input_ids.shape == (1, sum(len(row.ids) for row in ROWS))
    assert shared.input_ids.shape == (len(ROWS), max(len(row.ids) for row in ROWS))


def test_a_forward_adds_nothing_to_what_is_saved_and_trained() -> None:
    policy, _ = tiny_models()
    names = [name for name, _ in policy.named_parameters()]
    forward = forward_of(policy)
    assert list(forward.model.state_dict()) == list(policy.state_dict())
    assert [name for name, _ in forward.root.named_parameters()] == [f"model.{name}" for name in names]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_model_is_computed_through_the_methods_of_its_root() -> None:
    """FSDP2 on one rank: parameters are sharded tensors all the same, and embedding and head are tied."""
    batch = collate(ROWS, PAD)
    policy, value_model = tiny_models()
    logprobs, values = token_logprobs(policy, batch, 0.7), token_values(value_model, batch)
    logprobs.sum().backward()
    expected = policy.get_input_embeddings().weight.grad.clone()
    policy.zero_grad()

    mesh = init_device_mesh("cpu", (1,))
    forwards = forward_of(policy), forward_of(value_model)
    for forward in forwards:
        for layer in forward.model.base_model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(forward.root, mesh=mesh)
        for method in RootModule.METHODS:
            register_fsdp_forward_method(forward.root, method)
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        token_logprobs(policy, batch, 0.7)
    found = forwards[0].logprobs(batch, 0.7)
    torch.testing.assert_close(found, logprobs)
    torch.testing.assert_close(forwards[0].logprobs_and_entropy(batch, 0.7).logprobs, logprobs)
    torch.testing.assert_close(forwards[1].values(batch), values)
    found.sum().backward()
    gradient = policy.get_input_embeddings().weight.grad
    assert isinstance(gradient, DTensor)
    torch.testing.assert_close(gradient.full_tensor(), expected)
