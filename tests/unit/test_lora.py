"""Adapters of every family against peft's own merging and against transformers' plain loaders."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rayrlhf.config import LoRAConfig
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.batching import collate
from rayrlhf.models.checks import check_architecture, parameter_counts
from rayrlhf.models.loading import (
    checkpoint_gradients,
    load_policy,
    load_reward_model,
    load_tokenizer,
)
from rayrlhf.models.logprobs import sequence_scores, token_logprobs
from rayrlhf.models.lora import (
    adapters,
    add_adapters,
    frozen_weights,
    has_adapters,
    load_trained_state,
    merged_state,
    trained_state,
)
from rayrlhf.models.saving import save_model
from tests.families import FAMILIES, TINY, V, write_model

LORA = LoRAConfig(rank=4, alpha=12)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(FAMILIES[request.param], tmp_path_factory.mktemp("models") / request.param)


def logprobs(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, V, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    return token_logprobs(model, collate([Row.completion(ids[:10], ids[10:])], pad_token_id=1))


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """As if after training: everything that is trained has changed."""
    generator = torch.Generator().manual_seed(2)
    for tensor in trained_state(model).values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def merged_by_peft(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State dict after peft has merged in place and its wrappers are gone."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model.state_dict()


def test_new_adapters_change_nothing_and_trained_ones_what_peft_says(family: Path, tmp_path: Path) -> None:
    plain, model = load_policy(str(family)), load_policy(str(family))
    add_adapters(model, LORA, seed=7)
    torch.testing.assert_close(logprobs(model), logprobs(plain), rtol=0, atol=1e-6)

    trained(model)
    expected = merged_by_peft(model)
    found = merged_state(model)
    assert found.keys() == expected.keys() == plain.state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, found[name])}
    assert changed == adapters(model).keys() and len(changed) >= 8

    save_model(model, load_tokenizer(str(family)), tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logprobs(saved), logprobs(model), rtol=0, atol=2e-5)
    assert (logprobs(saved) - logprobs(plain)).abs().max() > 1e-2
    assert not any("lora" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    assert not list((tmp_path / "saved").glob("adapter_*"))  # transformers would then load it as adapters
    own = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(family), tmp_path / "saved" / "adapters"
    ).eval()
    ids = torch.randint(3, V, (1, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, saved(ids).logits, rtol=0, atol=2e-4)
    assert has_adapters(model) and not has_adapters(plain), "saving leaves the model as it is"


def test_only_adapters_are_trained(family: Path) -> None:
    model = load_policy(str(family))
    add_adapters(model, LORA, seed=7)
    frozen = {name: parameter.clone() for name, parameter in frozen_weights(model)}
    assert frozen.keys() == dict(load_policy(str(family)).named_parameters()).keys()
    logprobs(checkpoint_gradients(model)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    # B starts at 0: the first gradient is B's alone, and through it the model moves.
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ".lora_B." in n and p.grad is not None)


def test_a_reward_models_head_is_trained_beside_its_adapters(tmp_path: Path) -> None:
    model = load_reward_model(TINY, fresh_head_seed=0)
    add_adapters(model, LORA, seed=7)
    assert {name for name in trained_state(model) if ".lora_" not in name} == {"score.weight"}
    trained(model)
    save_model(model, load_tokenizer(TINY), tmp_path / "saved")
    batch = collate([Row.completion([5, 6, 7], [8, 9])], pad_token_id=1)
    saved = load_reward_model(str(tmp_path / "saved"))
    base = AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=1, pad_token_id=1, dtype=torch.float32)
    own = PeftModel.from_pretrained(base, tmp_path / "saved" / "adapters").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits[0, 0], sequence_scores(saved, batch)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sequence_scores(saved, batch), sequence_scores(model, batch), rtol=1e-4, atol=1e-4)


def test_the_seed_decides_and_torchs_own_is_left_alone() -> None:
    def states(seed: int) -> dict[str, torch.Tensor]:
        model = load_policy(TINY)
        add_adapters(model, LORA, seed)
        return trained_state(model)

    torch.manual_seed(5)
    first, second, other = states(1), states(1), states(2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_trained_state_restores_a_model() -> None:
    one, other = load_policy(TINY), load_policy(TINY)
    add_adapters(one, LORA, seed=1)
    add_adapters(other, LORA, seed=2)
    state = copy.deepcopy(trained_state(trained(one)))
    load_trained_state(other, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained_state(other).items())
    with pytest.raises(ValueError, match="other parameters"):
        load_trained_state(load_policy(TINY), state)


def test_parameters_are_counted_without_loading(family: Path) -> None:
    model = load_policy(str(family))
    total = sum(p.numel() for p in model.parameters())
    add_adapters(model, LORA, seed=0)
    trained = sum(tensor.numel() for tensor in trained_state(model).values())
    bare = check_architecture(str(family), None, scores=False)
    assert parameter_counts(bare, LORA) == (total, trained)


def test_target_modules_are_the_ends_of_names() -> None:
    model = load_policy(TINY)
    add_adapters(model, LoRAConfig(target_modules=("q_proj", "self_attn.v_proj")), seed=0)
    assert {name.split(".")[-2] for name in adapters(model)} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: .*'proj'.*k_proj"):
        add_adapters(load_policy(TINY), LoRAConfig(target_modules=("proj",)), seed=0)
