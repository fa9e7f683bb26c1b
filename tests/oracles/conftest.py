"""Environment of the oracle tests, set before TRL is imported."""

import os

from trl import import_utils

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1")  # its PPO lives in trl.experimental, and the exact version is pinned
# TRL 1.12 knows vLLM up to 0.27, and its GRPO fails to import beside a newer one. No test here generates with either.
import_utils.is_vllm_available = lambda min_version=None: False
