"""The environment of tests and chaos, set before Ray, vLLM or transformers are imported; child processes inherit it."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",  # nothing is fetched: a test that needs the hub fails at once
    OMP_WAIT_POLICY="passive",  # two tests at a time share the cores: a thread that waits must not spin
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_prestart_worker_first_driver="0",  # as `jobs.cluster.LOCAL_ENVIRONMENT` has it, for clusters that tests start
    RAY_worker_niceness="0",  # Ray's 15 starves its actors beside anything else that runs, and their tests time out
    RAY_agent_register_timeout_ms="120000",  # a node ends itself when its agents are not up in 15 s
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="",  # torchrl, which tests/oracles need, is one: every engine would import it, for 3 s of CPU time
)
