"""The learner's update against bare torch: forward and backward of the same two models over the same token batches.

The bare side replays, literally, the batches that `PPO.update` hands to the two models (recorded by hooks), with the
head on as many positions as there are response tokens, and a plain cross-entropy and squared error: no masks, ratios,
clipping, metrics, gradient norms or optimiser. What `PPO.update` takes beyond that is what the learner costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Child, Stopwatch, alternate, column, main
from benchmarks.results import Comparison, Fact, Measurement, Result
from benchmarks.workload import MODEL, RESPONSE, THREADS, Lengths, draw, lengths_text, write_reward_model
from rayrlhf.algorithms.registry import make_trainer
from rayrlhf.config_rl import PPOConfig
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import checkpoint_gradients, load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.ranks import Ranks
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Trajectory

SAMPLES = 64
CASES: tuple[tuple[str, Lengths, int], ...] = (
    ("equal lengths", "equal", 1),
    ("real lengths, uncapped", "uncapped", 1),
    ("real lengths, four samples a prompt", "uncapped", 4),
)


class Learner:
    """One PPO update and its bare counterpart, in one process because they share models and batches."""

    def __init__(
        self,
        reward_model: str,
        lengths: Lengths,
        samples_per_prompt: int,
        device: str,
        dtype: str,
        samples: int = SAMPLES,
    ) -> None:
        self.lengths, self.samples, self.samples_per_prompt = lengths, samples, samples_per_prompt
        constant = OptimizerConfig(lr=3e-6, schedule="constant")
        config = PPOConfig(
            prompts_per_step=samples // samples_per_prompt, samples_per_prompt=samples_per_prompt, epochs=1,
            optimizer=constant, missing_eos_reward=None,
        )  # fmt: skip
        pad = load_tokenizer(MODEL).pad_token_id
        ranks = Ranks(torch.get_num_threads(), gpu=device == "cuda")
        policy, value_model = (load(path, device=device) for load, path in
                               ((load_policy, MODEL), (load_reward_model, reward_model)))  # fmt: skip
        forward_of = partial(Forward, pad_token_id=pad, max_tokens=config.micro_batch_tokens, dtype=dtype)
        self.rl = make_trainer(
            config, forward_of(policy), forward_of(value_model), ranks, max_response_tokens=RESPONSE, seed=0
        )
        self.device, self.dtype = device, dtype
        self.clock = Stopwatch()
        self.clock.around(self.rl, "update", "update")
        assert self.rl.critic
        self.critic = self.rl.critic
        for optimizer in (self.rl.policy_optimizer, self.critic.optimizer):
            for method in ("clip", "apply"):
                self.clock.around(optimizer, method, "optimiser")
        self.batches: list[tuple[nn.Module, dict[str, Any]]] = []
        for model in (policy, value_model):
            model.base_model.register_forward_pre_hook(self._record, with_kwargs=True)
        self.run(99)

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            assert not args, "the models are called by keyword"
            self.batches.append((model, kwargs))

    def run(self, turn: int) -> Measurement:
        trajectories = made(draw(self.lengths, self.samples // self.samples_per_prompt, turn), self.samples_per_prompt)
        self.clock.take()
        self.batches.clear()
        started = time.perf_counter()
        self.rl.step(trajectories, 0)
        self._synchronize()
        step = time.perf_counter() - started
        seconds, batches = self.clock.take(), list(self.batches)
        with counter() as count:
            self.bare(batches)
        self._synchronize()
        started = time.perf_counter()
        self.bare(batches)
        self._synchronize()
        bare = time.perf_counter() - started
        whole_mib = self.peak_mib(batches)
        started = time.perf_counter()
        with self._checkpointed():
            self.bare(batches)
            self._synchronize()
            checkpointed = time.perf_counter() - started
            checkpointed_mib = self.peak_mib(batches)
        useful = sum(t.length for t in trajectories)
        computed = sum(
            kwargs["input_ids"].numel() for model, kwargs in batches if model is self.rl.policy.model.base_model
        )
        flops = count.get_total_flops()
        return {
            "update": useful / seconds["update"],
            "update without optimiser": useful / (seconds["update"] - seconds["optimiser"]),
            "bare": useful / bare, "step": useful / step, "GFLOP/s": flops / seconds["update"] / 1e9,
            "bare GFLOP/s": flops / bare / 1e9, "computed tokens a token": computed / useful,
            "checkpointed": useful / checkpointed, "MiB": whole_mib, "checkpointed MiB": checkpointed_mib,
        }  # fmt: skip

    def bare(self, batches: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
        """Forward and backward of every batch; gradients are left and dropped."""
        policy, value_model = self.rl.policy.model, self.critic.forward.model
        positions = self.samples * RESPONSE * 2 // len(batches)  # the head is linear in them: the sum counts
        targets = torch.arange(positions, device=self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            for model, kwargs in batches:
                states = model(**kwargs).last_hidden_state.flatten(0, 1)[:positions]
                loss: Tensor
                if model is policy.base_model:
                    loss = cross_entropy(policy.get_output_embeddings()(states).float(), targets[: len(states)])
                else:
                    loss = value_model.score(states).square().mean()
                loss.backward()
        self.batches.clear()
        policy.zero_grad(set_to_none=True)
        value_model.zero_grad(set_to_none=True)

    def peak_mib(self, batches: Sequence[tuple[nn.Module, dict[str, Any]]]) -> float:
        """Most memory that the bare pass over the batches takes beyond what there is before it, gradients included."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
            self.bare(batches)
            return (torch.cuda.max_memory_allocated() - allocated) / 2**20
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory, still held, would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _resident_mib("VmRSS")
        self.bare(batches)
        return _resident_mib("VmHWM") - before

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        models = self.rl.policy.model, self.critic.forward.model
        for model in models:
            checkpoint_gradients(model)
        yield
        for model in models:
            model.gradient_checkpointing_disable()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _resident_mib(what: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def made(prompts: Sequence[Any], samples: int) -> list[Trajectory]:
    """Samples of 48 random tokens with random scores and log-probs near the uniform ones."""
    rng = np.random.default_rng(0)
    found = []
    for prompt in prompts:
        for index in range(samples):
            logprobs = rng.normal(-9.0, 0.1, (2, RESPONSE)).astype(np.float32)
            found.append(
                Trajectory(
                    prompt.id, index, 0, np.array(prompt.ids), rng.integers(4, 8192, RESPONSE), logprobs[0],
                    np.zeros(RESPONSE, np.int64), "length", {"reward": float(rng.normal())}, logprobs[1],
                )
            )  # fmt: skip
    return found


def counter() -> FlopCounterMode:
    """torch's counter, taught the CPU's attention: two products forward and five backward, over the causal half or,
    where answers see a prompt, over all that is multiplied."""
    aten = torch.ops.aten

    def products(query: Any, key: Any, causal: bool) -> int:
        batch, heads, length, size = query
        return int(batch * heads * length * key[2] * size) * (1 if causal else 2)

    def forward(
        query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
    ) -> int:
        return 2 * products(query, key, causal)

    def backward(_grad: Any, query: Any, key: Any, *rest: Any, **_: Any) -> int:
        return 5 * products(query, key, causal=rest[4])  # value, output, log-sums, dropout, causal

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Products:
    """Matrix products alone, in GFLOP/s: a large cube, and what one micro-batch of the policy multiplies."""

    def __init__(self, tokens: int = 4096) -> None:
        config = load_policy(MODEL).config
        hidden, inner, layers = config.hidden_size, config.ffn_dim, config.num_hidden_layers
        head = RESPONSE * tokens // 400
        forward = [(tokens, hidden, hidden)] * 4 + [(tokens, hidden, inner), (tokens, inner, hidden)]
        forward = forward * layers + [(head, hidden, config.vocab_size)]
        # y = x w; backward: dx = dy w', dw = x' dy
        self.shapes = [shape for m, k, n in forward for shape in ((m, k, n), (m, n, k), (k, m, n))]
        self.matrices = [(torch.randn(m, k), torch.randn(k, n)) for m, k, n in self.shapes]
        self.cube = torch.randn(2048, 2048), torch.randn(2048, 2048)
        self.run(0)

    def run(self, turn: int) -> Measurement:
        flops = sum(2 * m * k * n for m, k, n in self.shapes)
        return {
            "cube": 2 * 2048**3 / best(lambda: torch.mm(*self.cube)) / 1e9,
            "shapes": flops / best(lambda: [torch.mm(a, b) for a, b in self.matrices]) / 1e9,
        }


def best(work: Any, times: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def run(quick: bool) -> Result:
    turns = range(1 if quick else 3)
    result = Result(
        {
            "batch": f"{SAMPLES} samples of {RESPONSE} tokens, one PPO epoch, float32, {THREADS} threads",
            "bare": "forward and backward alone over the batches that `PPO.update` made",
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        reward_model = write_reward_model(Path(directory) / "reward_model")
        for name, lengths, samples in CASES[:1] if quick else CASES:
            child = partial(Child, Learner, reward_model, lengths, samples, "cpu", "float32", threads=THREADS)
            found = alternate({name: child}, turns)[name]
            compare = partial(
                Comparison, unit="tokens/s", theirs=column(found, "bare"), against="bare torch forward + backward"
            )
            result.comparisons.extend(
                (
                    compare(f"{name}: `PPO.update`", ours=column(found, "update"), at_least=0.9),
                    compare(f"{name}: without clipping and AdamW", ours=column(found, "update without optimiser")),
                    compare(f"{name}: bare, with gradient checkpointing", ours=column(found, "checkpointed")),
                )
            )
            result.facts.extend(
                (
                    Fact(f"{name}: `PPO.step`, experience included", "tokens/s", column(found, "step")),
                    Fact(f"{name}: `PPO.update`", "GFLOP/s", column(found, "GFLOP/s")),
                    Fact(f"{name}: bare", "GFLOP/s", column(found, "bare GFLOP/s")),
                    Fact(
                        f"{name}: tokens computed for every token of a sample",
                        "",
                        column(found, "computed tokens a token"),
                    ),
                    Fact(f"{name}: peak memory of the bare pass", "MiB", column(found, "MiB")),
                    Fact(f"{name}: the same with gradient checkpointing", "MiB", column(found, "checkpointed MiB")),
                )
            )
            result.settings[name] = lengths_text(lengths, SAMPLES // samples, len(turns))
        products = alternate({"products": partial(Child, Products, threads=THREADS)}, turns)["products"]
        result.facts.append(Fact("matrix product, 2048 cube", "GFLOP/s", column(products, "cube")))
        result.facts.append(Fact("matrix products of the model's own shapes", "GFLOP/s", column(products, "shapes")))
    return result


if __name__ == "__main__":
    main("learner")
