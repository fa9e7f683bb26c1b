"""Weight sync against its floor: how long the learner is blocked, and how long until the generator serves the weights.

`publish` is compared with one `ray.put` of as many bytes in one numpy array. The whole way, publish and load by the
generator actor, is compared with that put, a zero-copy read in another actor, and vLLM's own `reload_weights` there;
and with all that plus what this reload leaves undone on a CPU, where a tied output head multiplies with a packed copy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import ENVIRONMENT, Child, alternate, column, main
from benchmarks.results import Comparison, Fact, Measurement, Result
from benchmarks.workload import MODEL, THREADS
from rayrlhf.config import LoRAConfig, ModelConfig
from rayrlhf.config_resources import GeneratorConfig

SETTINGS = GeneratorConfig(threads=1, kv_cache_mib=64, max_num_seqs=8)
CONTEXT = 128
TIMEOUT_S = 600
LORA = LoRAConfig()


def opt_125m(directory: Path) -> str:
    """A model of OPT-125M's shape with random weights."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig()).save_pretrained(directory)
    return str(directory)


class PlainEngine:
    """An actor with `vllm.LLM` and vLLM's own reload."""

    def __init__(self, model: str) -> None:
        from actors.rollouts.engine import environment_variables

        os.environ.update({k: v for k, v in environment_variables(SETTINGS).items() if not k.startswith("OMP_")})
        from vllm import LLM

        self.llm = LLM(
            model=model, dtype="float32", max_model_len=CONTEXT, max_num_seqs=SETTINGS.max_num_seqs, seed=0,
            skip_tokenizer_init=True, enforce_eager=True, use_tqdm_on_load=False, enable_chunked_prefill=False,
            kv_cache_memory_bytes=SETTINGS.kv_cache_mib * 2**20, block_size=32,
        )  # fmt: skip

    def reload(self, array: Any, layout: list[tuple[str, tuple[int, ...]]]) -> float:
        """Views of one array of float32, handed to vLLM. Returns its seconds."""
        started = time.perf_counter()
        flat, start, tensors = torch.from_numpy(array), 0, []
        for name, shape in layout:
            size = int(np.prod(shape))
            tensors.append((name, flat[start : start + size].view(shape)))
            start += size
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        return time.perf_counter() - started

    def pack_head(self) -> float:
        """What the reload leaves undone; returns its seconds."""
        started = time.perf_counter()
        self.llm.collective_rpc(pack_head)
        return time.perf_counter() - started


def pack_head(worker: Any) -> None:
    """Runs on vLLM's worker."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in worker.model_runner.get_model().modules():
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class Sync:
    """A private Ray cluster; this process is the learner, two actors hold the engines."""

    def __init__(self, model: str, lora: LoRAConfig | None = None) -> None:
        import ray

        from actors.rollouts.engine import environment_variables
        from actors.rollouts.generator import Generator
        from actors.rollouts.publisher import Publisher
        from rayrlhf.models.loading import load_policy
        from rayrlhf.models.lora import add_adapters

        os.environ.update(ENVIRONMENT)
        self.directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds Unix sockets
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=self.directory, log_to_driver=False,
            object_store_memory=3 * 2**30,
        )  # fmt: skip
        self.policy = load_policy(model)
        self.floats = sum(p.numel() for p in self.policy.parameters())
        if lora:
            add_adapters(self.policy, lora, seed=0)
        self.publisher = Publisher(self.policy, local=False)
        variables = {"env_vars": environment_variables(SETTINGS)}
        self.generator = ray.remote(Generator).options(num_cpus=0, runtime_env=variables).remote(
            "generator", ModelConfig(path=model), SETTINGS, CONTEXT, 0
        )  # fmt: skip
        # Adapters have nothing to be compared with: vLLM's own reload takes whole weights.
        self.plain = None if lora else ray.remote(PlainEngine).options(num_cpus=0, runtime_env=variables).remote(model)
        ray.get(self.generator.ready.remote(), timeout=TIMEOUT_S)
        self.version = 0
        self.held: Any = None
        self.run(0)

    def run(self, turn: int) -> Measurement:
        if not self.plain:
            return self._ours()
        measure: list[Callable[[], Measurement]] = [self._ours, self._theirs]
        first, second = measure if turn % 2 == 0 else reversed(measure)
        return first() | second()

    def _ours(self) -> Measurement:
        import ray

        self.held = None  # the last publication's memory, as a learner lets go of it
        self.version += 1
        started = time.perf_counter()
        self.held = self.publisher.publish(self.version)
        blocked = time.perf_counter() - started
        ray.get(self.generator.load_weights.remote(self.held), timeout=TIMEOUT_S)
        whole_way = time.perf_counter() - started
        trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        return {"publish": blocked, "whole way": whole_way, "share": trained / self.floats}

    def _theirs(self) -> Measurement:
        import ray

        flat = torch.nn.utils.parameters_to_vector(self.policy.parameters()).detach().numpy()
        layout = [(name, tuple(p.shape)) for name, p in self.policy.named_parameters()]
        self.held = None
        started = time.perf_counter()
        self.held = ray.put(flat)
        blocked = time.perf_counter() - started
        assert self.plain
        reload = ray.get(self.plain.reload.remote(self.held, layout), timeout=TIMEOUT_S)
        put_and_reload = time.perf_counter() - started
        pack = ray.get(self.plain.pack_head.remote(), timeout=TIMEOUT_S)
        return {"put": blocked, "put and reload": put_and_reload, "all": time.perf_counter() - started,
                "reload": reload, "pack": pack, "memcpy": copied(flat)}  # fmt: skip

    def close(self) -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)


def copied(flat: Any) -> float:
    """Seconds of a copy into memory that is there already."""
    into = np.zeros_like(flat)
    started = time.perf_counter()
    np.copyto(into, flat)
    return time.perf_counter() - started


def run(quick: bool) -> Result:
    turns = range(1 if quick else 7)
    result = Result({"weights": "float32, one generator on the same node, engines of one thread each"})
    with tempfile.TemporaryDirectory() as directory:
        models = {"embedded, 5.5 M parameters": MODEL}
        if not quick:
            models["OPT-125M's shape, random weights"] = opt_125m(Path(directory))
        for name, model in models.items():
            found = alternate({name: partial(Child, Sync, model, threads=THREADS)}, turns)[name]
            get = partial(column, found)
            result.comparisons.extend(
                (
                    Comparison(f"{name}: learner blocked", "s", get("publish"), get("put"), "`ray.put`", at_most=1.3),
                    Comparison(
                        f"{name}: until the generator serves them", "s", get("whole way"), get("put and reload"),
                        "`ray.put` + vLLM's reload", at_most=1.3,
                    ),
                    Comparison(
                        f"{name}: until the generator serves them", "s", get("whole way"), get("all"),
                        "`ray.put` + vLLM's reload + the head packed again",
                    ),
                )
            )  # fmt: skip
            result.facts.append(Fact(f"{name}: vLLM's own reload", "s", get("reload")))
            result.facts.append(Fact(f"{name}: packing the head again", "s", get("pack")))
            result.facts.append(Fact(f"{name}: memcpy of the same bytes", "s", get("memcpy")))
            adapted = f"{name}, LoRA of rank {LORA.rank}"
            get = partial(column, alternate({name: partial(Child, Sync, model, LORA, threads=THREADS)}, turns)[name])
            result.facts.append(Fact(f"{adapted}: learner blocked", "s", get("publish")))
            result.facts.append(Fact(f"{adapted}: until the generator serves them", "s", get("whole way")))
            result.facts.append(Fact(f"{adapted}: sent, of the bytes of all weights", "", get("share")))
    return result


if __name__ == "__main__":
    main("weight_sync")
