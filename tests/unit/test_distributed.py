"""What a worker says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayrlhf.models.ranks import Ranks


def test_peak_memory_on_a_cpu_is_the_kernels_high_water_mark() -> None:
    held = np.ones(2**23)  # 64 MiB
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    peak, current = (float(status[key].split()[0]) / 1024 for key in ("VmHWM", "VmRSS"))
    found = Ranks(1).peak_memory_mib()
    assert found == pytest.approx(peak, rel=0.01) and found >= 0.99 * current > held.nbytes / 2**20
