"""The weights that a generator takes: a whole set, by the names in memory or by those in files."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.rollouts.engine_weights import CheckpointLayout
from actors.rollouts.weight_sync import WeightSyncError
from tests.families import FAMILIES, write_model


@pytest.mark.parametrize("name", FAMILIES)
def test_both_names_of_a_weight_are_known(name: str, tmp_path: Path) -> None:
    write_model(FAMILIES[name], tmp_path)
    layout = CheckpointLayout.read(str(tmp_path), None)
    in_files = load_file(tmp_path / "model.safetensors")
    in_memory = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert (in_files.keys() == in_memory.keys()) == (name != "gpt-neox"), "embed_out.weight and lm_head.weight"
    for given in (in_files, in_memory):
        assert {name for name, _ in layout.validated(given.items())} == in_files.keys()
    first = next(iter(in_files))
    with pytest.raises(WeightSyncError, match="1 missing"):
        layout.validated((name, tensor) for name, tensor in in_files.items() if name != first)
