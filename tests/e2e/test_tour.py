"""The notebook of the documentation runs on a finished run as it stands."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.tour import execute

# It starts a kernel and loads models; unit/test_docs_site holds the stored one to the script.
pytestmark = pytest.mark.long


def test_every_cell_of_the_tour_runs(finished: Any) -> None:
    code = [cell for cell in execute(finished.path).cells if cell.cell_type == "code"]
    assert all(cell.outputs and not any(o.output_type == "error" for o in cell.outputs) for cell in code)
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in code]
    assert "README.md" in texts[-1] and "model.safetensors" in texts[-1]
