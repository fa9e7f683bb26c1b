"""vLLM behind one small interface. The whole of vLLM's moving API is in this file, and nothing else imports vllm.

vLLM is imported inside methods, after the environment variables that it reads at import: that takes 5-30 s a process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from actors.weight_sync import WeightSyncError
from rayrlhf.config import GeneratorConfig
from rayrlhf.errors import UserError
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

_BATCHED_TOKENS = 4096
"""Tokens of one engine step."""
_MIN_TEMPERATURE = 0.01
"""vLLM silently raises lower temperatures to this one, and its log-probs would then be of another distribution."""


def environment(settings: GeneratorConfig) -> dict[str, str]:
    """Environment variables of a generator's process; those of OpenMP work only if set before it starts."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: less memory, weights by reference
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # actors share cores; Ray counts them, vLLM must not pin them
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(settings.threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads starve the neighbours on a shared machine
    }
    if "HF_HUB_OFFLINE" in os.environ:
        variables["HF_HUB_OFFLINE"] = os.environ["HF_HUB_OFFLINE"]
    return variables


class Engine:
    """One vLLM engine in this process, stepped by whoever calls `generate`; not safe to share between threads."""

    def __init__(
        self,
        model_path: str,
        *,
        revision: str | None,
        dtype: str,
        max_model_len: int,
        settings: GeneratorConfig,
        seed: int,
    ) -> None:
        """Load the model at `model_path` (a directory or hub name) for at most `max_model_len` tokens a sequence.

        Raises:
            UserError: vLLM cannot serve this model with these settings.
        """
        os.environ.update({k: v for k, v in environment(settings).items() if not k.startswith("OMP_")})
        from vllm import EngineArgs, LLMEngine

        on_gpu = settings.gpus > 0
        # On a CPU the default block of 128 tokens is too coarse for short prompts to share; 32 is its smallest.
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": settings.gpu_memory_utilization}
            if on_gpu
            else {"kv_cache_memory_bytes": settings.kv_cache_mib * 2**20, "block_size": 32}
        )
        self._threads = settings.threads
        self._max_model_len = max_model_len
        self._requests = 0
        self._broken: str | None = None
        try:
            arguments = EngineArgs(
                model=model_path,
                revision=revision,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=settings.max_num_seqs,
                seed=seed,
                skip_tokenizer_init=True,  # token ids in, token ids out
                generation_config="vllm",  # the model's own sampling defaults must not leak in
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
                enable_prefix_caching=True,
                # vLLM rewinds a seeded generator for every cut of a prefill, and CPU generators cannot be rewound.
                enable_chunked_prefill=on_gpu,
                max_num_batched_tokens=max(_BATCHED_TOKENS, max_model_len, settings.max_num_seqs),
                enforce_eager=not on_gpu,  # compiling for a CPU takes minutes
                use_tqdm_on_load=False,
                disable_log_stats=True,
                **memory,
            )
            with self._thread_count():
                self._llm = LLMEngine.from_engine_args(arguments)
        except (ValueError, OSError) as error:
            raise UserError(
                f"model {model_path}: vLLM cannot serve it: {_one_line(error, 280)} "
                "(resources.generators sets its memory, data.max_*_tokens its max_model_len)"
            ) from error
        self._vocab_size = int(self._llm.model_config.get_vocab_size())
        self._parameters, self._aliases = _checkpoint_layout(model_path, revision)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """One response per request, in their order, batched continuously; tokens are stamped with `version`.

        A response ends with the first sampled EOS, which is kept ("eos"), or after `max_tokens` ("length"). Samples of
        one prompt share its prefix in the KV cache. Each request's own seed decides its sample.

        Raises:
            UserError: a prompt that is empty, too long or not of this vocabulary; a temperature below 0.01.
            WeightSyncError: a weight load failed half-way earlier.
        """
        from vllm import SamplingParams

        self._check(requests, sampling)
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
                stop_token_ids=[sampling.eos_token_id],
                ignore_eos=True,  # of the model's config: only `eos_token_id` ends a response
                logprobs=0,  # the sampled token's own and no others
                detokenize=False,
            )
            for request in requests
        ]
        outputs = self._run([request.prompt_ids for request in requests], parameters)
        trajectories = []
        for request, output in zip(requests, outputs, strict=True):
            sample = output.outputs[0]
            ids = np.asarray(sample.token_ids, dtype=np.int64)
            logprobs = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
            trajectories.append(
                Trajectory(
                    prompt_id=request.prompt_id,
                    sample_index=request.sample_index,
                    seed=request.seed,
                    prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
                    response_ids=ids,
                    generator_logprobs=np.asarray(logprobs, dtype=np.float32),
                    versions=np.full(len(ids), version, dtype=np.int64),
                    finish_reason="eos" if ids[-1] == sampling.eos_token_id else "length",
                )
            )
        return trajectories

    def prompt_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """[T - 1] log p(token t | tokens before t) for t = 1 .. T - 1, at temperature 1, in nats. For checks."""
        from vllm import SamplingParams

        self._require_whole()
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = self._run([token_ids], [parameters])[0]
        steps = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return np.asarray([step[token].logprob for step, token in steps], dtype=np.float32)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights. `tensors` carry Hugging Face names of the same architecture and must be complete.

        Names and shapes are checked before anything is touched: such an error leaves the old weights serving.
        An error after that leaves an engine that refuses all further work.

        Raises:
            WeightSyncError: incomplete, unknown or misshapen tensors; or the load failed half-way.
        """
        self._require_whole()
        weights = self._validated(tensors)
        self._broken = "a weight load did not finish"
        try:
            with self._thread_count():
                self._llm.collective_rpc(_reload, args=(weights,))
                # Blocks of the old weights' keys and values would poison every prompt that shares a prefix with them.
                if not self._llm.reset_prefix_cache():
                    raise RuntimeError("the prefix cache could not be reset: requests still hold blocks")
        except BaseException as error:
            self._broken = f"a weight load failed half-way ({type(error).__name__}: {_one_line(error, 200)})"
            raise WeightSyncError(f"{self._broken}; restart the generator") from error
        self._broken = None

    def close(self) -> None:
        """Free the model and its KV cache; the engine cannot be used afterwards."""
        self._broken = "it was closed"
        self._llm.engine_core.shutdown()
        del self._llm

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        """Outputs of all prompts, in order. Nothing stays behind in the engine if a step raises."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        position: dict[str, int] = {}
        outputs: list[Any] = [None] * len(prompts)
        with self._thread_count():
            try:
                for i, (prompt, params) in enumerate(zip(prompts, parameters, strict=True)):
                    params.output_kind = RequestOutputKind.FINAL_ONLY
                    name = str(self._requests)
                    self._requests += 1
                    position[name] = i
                    self._llm.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), params)
                while self._llm.has_unfinished_requests():
                    for output in self._llm.step():
                        outputs[position.pop(output.request_id)] = output
            finally:
                if position:
                    self._llm.abort_request(list(position))
        return outputs

    def _check(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> None:
        self._require_whole()
        if sampling.temperature < _MIN_TEMPERATURE:
            raise UserError(f"temperature {sampling.temperature:g} is too low for vLLM, use {_MIN_TEMPERATURE} or more")
        for request in requests:
            length, ids = len(request.prompt_ids), request.prompt_ids
            if not length:
                raise UserError(f"prompt {request.prompt_id}: it has no tokens; drop it from the data")
            if length + sampling.max_tokens > self._max_model_len:
                raise UserError(
                    f"prompt {request.prompt_id}: {length} tokens and a response of {sampling.max_tokens} exceed the "
                    f"generator's {self._max_model_len}; cut the prompt to data.max_prompt_tokens"
                )
            if min(ids) < 0 or max(ids) >= self._vocab_size:
                raise UserError(
                    f"prompt {request.prompt_id}: token ids {min(ids)}..{max(ids)} do not fit the vocabulary of "
                    f"{self._vocab_size}; tokenise it with the model's own tokenizer"
                )

    def _validated(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        weights = [(name, tensor) for name, tensor in tensors if name not in self._aliases]
        shapes = {name: tuple(tensor.shape) for name, tensor in weights}
        wanted = self._parameters
        faults = {
            "missing": sorted(wanted.keys() - shapes.keys()),
            "unknown": sorted(shapes.keys() - wanted.keys()),
            "of another shape": sorted(n for n in shapes.keys() & wanted.keys() if shapes[n] != wanted[n]),
            "given twice": sorted({name for name, count in Counter(name for name, _ in weights).items() if count > 1}),
        }
        found = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in faults.items() if names)
        if found:
            raise WeightSyncError(f"the weights do not fit the model, nothing was loaded: {found}")
        return weights

    def _require_whole(self) -> None:
        if self._broken:
            raise WeightSyncError(f"this engine refuses to work: {self._broken}; restart the generator")

    @contextmanager
    def _thread_count(self) -> Iterator[None]:
        """`settings.threads` for the engine only: with `--local` the learner shares this process."""
        set_num_threads, before = torch.set_num_threads, torch.get_num_threads()
        set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads  # a starting engine disables it for the whole process
            set_num_threads(before)


def _checkpoint_layout(model_path: str, revision: str | None) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the tensors that make up a complete set, by name; and the further names of tied ones."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path, revision=revision))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unique = {name for name, _ in model.named_parameters()}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - unique
    return {name: shape for name, shape in state.items() if name not in aliases}, aliases


def _reload(worker: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
    """Runs on vLLM's worker, between two steps: its layerwise reload, made to notice what it does not load."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        initialize_layerwise_reload(model)
        loaded = model.load_weights(iter(weights))
        finalize_layerwise_reload(model, worker.model_config)
    if loaded is not None and expected - loaded:
        raise RuntimeError(f"vLLM kept old weights for {sorted(expected - loaded)[:3]}")
    for layer in model.modules():
        # On a CPU the output head multiplies with a packed copy of its weight, which the reload leaves as it was
        # when head and embedding are tied: without an error, log-probs would come from old and new weights mixed.
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def _one_line(error: BaseException, limit: int) -> str:
    return " ".join(str(error).split())[:limit]
