"""rayrlhf: reinforcement learning from human feedback on Ray (the library, which knows neither Ray nor vLLM).

    from rayrlhf import load_config, run

    finished = run(load_config("configs/quickstart.yaml", ["rl.steps=5"]))
    finished.evaluation        # a data frame, as are samples, metrics and comparisons

These names are imported when they are first used, so that `import rayrlhf` costs nothing (docs/python.md).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {"load_config": "rayrlhf.config_file", "run": "jobs.api", "Run": "jobs.api"}
"""What Python users import from here, and the module that has it. The commands are in `jobs`, above this package."""


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'rayrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
