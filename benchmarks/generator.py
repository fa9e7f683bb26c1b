"""Our generator against plain vLLM: `generation.generate` and `vllm.LLM.generate` on the same prompts as token ids.

Both engines run in their own process with the same settings, sampling parameters and seeds. Ours also makes a
trajectory of every output; a second row shows plain vLLM without the seeds and log-probs that PPO needs.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

from benchmarks.harness import Child, alternate, column, main
from benchmarks.results import Comparison, Measurement, Result
from benchmarks.workload import CONTEXT, MODEL, RESPONSE, THREADS, Lengths, draw, lengths_text
from rayrlhf.config import ModelConfig
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.data.prompts import requests_for
from rayrlhf.models.loading import load_policy, load_tokenizer
from rayrlhf.trajectory import GenerationRequest, Sampling

TEMPERATURE = 0.7
CASES: tuple[tuple[str, Lengths, int, int], ...] = (
    ("64 equal prompts of 128 tokens", "equal", 64, 1),
    ("256 equal prompts of 128 tokens", "equal", 256, 1),
    ("64 real prompts, uncapped", "uncapped", 64, 1),
    ("16 real prompts, uncapped, four samples each", "uncapped", 16, 4),
)
SETTINGS = GeneratorConfig(threads=THREADS)


def requests(case: int, turn: int) -> list[GenerationRequest]:
    _, lengths, prompts, samples = CASES[case]
    # Other prompts for every case and turn: nothing comes from a prefix cache but what samples of a prompt share.
    return requests_for(draw(lengths, prompts, 10 * turn + case), samples, "benchmark", turn)


class Ours:
    def __init__(self) -> None:
        from actors.pools.pool import Pool
        from actors.pools.remote import Remote
        from actors.rollouts.generator import Generator
        from actors.rollouts.weight_sync import publish

        pad = load_tokenizer(MODEL).pad_token_id  # never sampled: every response has its 48 tokens
        self.sampling = Sampling(TEMPERATURE, RESPONSE, pad)

        def spawn(name: str) -> Remote:
            return Remote.spawn(name, Generator, name, ModelConfig(path=MODEL), SETTINGS, CONTEXT, 0, local=True)

        self.generators = Pool("generator", 1, spawn, start_timeout_s=600, call_timeout_s=600)
        self.generators.broadcast("load_weights", publish(load_policy(MODEL).named_parameters(), 1, local=True))
        self._generate(0, 99)

    def run(self, turn: int) -> Measurement:
        return {CASES[case][0]: self._generate(case, turn) for case in range(len(CASES))}

    def _generate(self, case: int, turn: int) -> float:
        from actors.rollouts.in_turn import generate

        asked = requests(case, turn)
        started = time.perf_counter()
        trajectories = generate(self.generators, asked, self.sampling, 1)
        return sum(t.written_tokens for t in trajectories) / (time.perf_counter() - started)


class Plain:
    """`vllm.LLM` with the arguments of actors/rollouts/engine.py."""

    def __init__(self, with_logprobs: bool) -> None:
        from actors.rollouts.engine import environment_variables

        os.environ.update({k: v for k, v in environment_variables(SETTINGS).items() if not k.startswith("OMP_")})
        import torch
        from vllm import LLM

        self.with_logprobs = with_logprobs
        self.pad = load_tokenizer(MODEL).pad_token_id
        set_num_threads = torch.set_num_threads
        self.llm = LLM(
            model=MODEL, dtype="float32", max_model_len=CONTEXT, max_num_seqs=SETTINGS.max_num_seqs, seed=0,
            skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs",
            enable_prefix_caching=True, enable_chunked_prefill=False, max_num_batched_tokens=4096, enforce_eager=True,
            use_tqdm_on_load=False, disable_log_stats=True, kv_cache_memory_bytes=SETTINGS.kv_cache_mib * 2**20,
            block_size=32,
        )  # fmt: skip
        set_num_threads(THREADS)  # a starting engine sets one of its own and disables the function
        self._generate(0, 99)

    def run(self, turn: int) -> Measurement:
        return {CASES[case][0]: self._generate(case, turn) for case in range(len(CASES))}

    def _generate(self, case: int, turn: int) -> float:
        from vllm import SamplingParams

        asked = requests(case, turn)
        ours: dict[str, Any] = {"logprobs": 0} if self.with_logprobs else {}
        parameters = [
            SamplingParams(
                temperature=TEMPERATURE, max_tokens=RESPONSE, stop_token_ids=[self.pad], ignore_eos=True,
                detokenize=False, seed=request.seed if self.with_logprobs else None, **ours,
            )
            for request in asked
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in asked]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - started)


def run(quick: bool) -> Result:
    turns = range(1 if quick else 5)
    result = Result(
        {
            "engine": f"vLLM, float32, eager, block size 32, prefix cache, no chunked prefill, {THREADS} threads",
            "responses": f"{RESPONSE} tokens each, temperature {TEMPERATURE}",
            "real prompts": lengths_text("uncapped", 64, len(turns)),
        }
    )
    contestants = {
        "rayrlhf": partial(Child, Ours, threads=THREADS),
        "vLLM": partial(Child, Plain, True, threads=THREADS),
        "vLLM, no log-probs": partial(Child, Plain, False, threads=THREADS),
    }
    measured = alternate(contestants, turns)
    for name, *_ in CASES:
        own = column(measured["rayrlhf"], name)
        compare = partial(Comparison, name, "tokens/s", own)
        result.comparisons.append(compare(column(measured["vLLM"], name), "vLLM, same parameters", at_least=0.9))
        result.comparisons.append(compare(column(measured["vLLM, no log-probs"], name), "vLLM, no seeds and log-probs"))
    return result


if __name__ == "__main__":
    main("generator")
