"""Environment of all tests, set before Ray, vLLM or transformers are imported; child processes inherit it."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",  # nothing is fetched: a test that needs the hub fails at once
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
)
