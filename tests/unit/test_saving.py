"""The last look at a model before it is saved for good."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from rayrlhf.config import LoRAConfig
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.models.lora import add_adapters
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import require_finite, save_model
from tests.tiny import tiny_models


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_found_and_named(value: float) -> None:
    policy, _ = tiny_models()
    require_finite(policy, "sft: the model", Ranks(1))
    name, parameter = list(policy.named_parameters())[5]
    with torch.no_grad():
        parameter.flatten()[-1] = value
        list(policy.parameters())[-1].fill_(value)
    with pytest.raises(FloatingPointError, match=f"^sft: the model has weights that are not finite.*{name} "):
        require_finite(policy, "sft: the model", Ranks(1))


def test_adapters_are_looked_at_as_well() -> None:
    policy, _ = tiny_models()
    add_adapters(policy, LoRAConfig(rank=2), seed=0)
    require_finite(policy, "rl: the policy", Ranks(1))
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lora_B"):
        require_finite(policy, "rl: the policy", Ranks(1))


def test_a_rank_names_the_parameter_that_another_rank_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a sharded model may see no fault in its own part."""
    policy, _ = tiny_models()
    ranks = Ranks(1)
    monkeypatch.setattr(ranks, "max", lambda value: max(value, -3.0))  # the other rank found the fourth
    with pytest.raises(FloatingPointError, match=list(policy.named_parameters())[3][0]):
        require_finite(policy, "reward_model: the model", ranks)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o007, 0o660), (0o077, 0o600)])
def test_a_models_files_are_readable_as_the_umask_says(
    tmp_path: Path, request: pytest.FixtureRequest, umask: int, expected: int
) -> None:
    """safetensors gives its own to nobody but the owner."""
    before = os.umask(umask)
    request.addfinalizer(lambda: os.umask(before))
    save_model(tiny_models()[0], load_tokenizer(resolve_model("embedded:opt-tiny")), tmp_path / "model")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {expected}, modes
