"""vLLM behind one small interface. Only this file and `engine_weights` import vllm, because its API moves.

The imports stand inside methods: vLLM reads environment variables as it is imported, so these have to be set first.
The import takes 5-30 s in every process; the coordinator and the driver import this file and do without it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.rollouts.weight_sync import WeightSyncError
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.errors import UserError, one_line
from rayrlhf.models.files import stored_names
from rayrlhf.scratch import nameless_semaphores
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

_BATCHED_TOKENS = 4096
"""Tokens of one engine step."""
_MIN_TEMPERATURE = 0.01
"""vLLM silently raises lower temperatures to this one. Its log-probs would then belong to another distribution."""


def environment_variables(settings: GeneratorConfig) -> dict[str, str]:
    """Environment variables of a generator's process. Those of OpenMP work only if they are set before it starts."""
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


@dataclass
class _InFlight:
    """A request that the engine works on."""

    ticket: int
    request: GenerationRequest
    vllm_id: str
    sampling: Sampling
    version: int
    """The weights that its next token is sampled from."""
    versions: list[int] = field(default_factory=list)
    """One entry for each token that was sampled before the last weight update: the weights that it came from."""


class Engine:
    """One vLLM engine in this process. It works only while `step` or `generate` runs. Threads must not share it."""

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
            UserError: vLLM cannot serve this model with these settings, or its directory lacks weights in safetensors.
        """
        if Path(model_path).is_dir():
            stored_names(Path(model_path), model_path)
        os.environ.update({k: v for k, v in environment_variables(settings).items() if not k.startswith("OMP_")})
        from vllm import EngineArgs, LLMEngine

        from actors.rollouts.engine_weights import CheckpointLayout

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
        self._in_flight: dict[str, _InFlight] = {}
        self._broken: str | None = None
        # vLLM bars the EOS ids of the model's own generation config as well until a response has its least length. Only
        # `Sampling.ends` are to be barred, since the learner knows no others: a generation config that says nothing.
        neutral = tempfile.TemporaryDirectory(prefix="rayrlhf-")
        (Path(neutral.name) / "generation_config.json").write_text("{}", encoding="utf-8")
        try:
            # Before vLLM starts: for its compiler it may change the class that this makes an object of.
            self._layout = CheckpointLayout.read(model_path, revision)
            arguments = EngineArgs(
                model=model_path,
                revision=revision,
                load_format="safetensors",  # vLLM would also unpickle a *.bin
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=settings.max_num_seqs,
                seed=seed,
                skip_tokenizer_init=True,  # token ids in, token ids out
                generation_config=neutral.name,  # the model's own sampling defaults must not leak in
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
            if not on_gpu:
                _keep_transformers_classes()
            # vLLM makes a semaphore for workers in processes of their own, which there are none of here.
            with self._thread_count(), nameless_semaphores():
                self._llm = LLMEngine.from_engine_args(arguments)
        except (ValueError, OSError) as error:
            raise UserError(
                f"model {model_path}: vLLM cannot serve it: {one_line(error)[:280]} "
                "(resources.generators sets its memory, data.max_*_tokens its max_model_len)"
            ) from error
        finally:
            neutral.cleanup()
        self._vocab_size = int(self._llm.model_config.get_vocab_size())

    def add(self, requests: Mapping[int, GenerationRequest], sampling: Sampling, version: int) -> None:
        """Queue requests under the caller's tickets; they join the running batch as soon as there is room.

        Each request's own seed decides its sample. Samples of one prompt share its prefix in the KV cache.

        Args:
            version: the weights that the engine holds; tokens are stamped with it until the next `load_weights`.

        Raises:
            UserError: a prompt that is empty, too long or not of this vocabulary; a temperature below 0.01. None of
                the requests was queued.
            WeightSyncError: a weight load failed half-way earlier.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self._check(list(requests.values()), sampling)
        for ticket, request in requests.items():
            parameters = SamplingParams(
                temperature=sampling.temperature,
                **sampling.truncation._asdict(),
                max_tokens=sampling.max_tokens,
                min_tokens=min(sampling.min_tokens, sampling.max_tokens),  # a late turn may have less room
                seed=request.seed,
                stop_token_ids=list(sampling.ends),
                ignore_eos=True,  # of the model's config: only `ends` end a response
                logprobs=0,  # the sampled token's own and no others
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = self._name()
            with self._thread_count():
                vllm_id = self._llm.add_request(
                    name, TokensPrompt(prompt_token_ids=list(request.prompt_ids)), parameters
                )
            self._in_flight[name] = _InFlight(ticket, request, vllm_id, sampling, version)

    @property
    def in_flight(self) -> int:
        """Requests that are queued or running."""
        return len(self._in_flight)

    def step(self) -> dict[int, Trajectory]:
        """Sample one token for every running request; returns the responses that this finished, by ticket.

        A response ends with the first sampled EOS or stop token, which is kept ("eos"), or after `max_tokens`
        ("length").
        If a step fails, all requests in flight are dropped.
        """
        try:
            with self._thread_count():
                outputs = self._llm.step()
        except BaseException:
            self.abort()
            raise
        return dict(self._finished(output) for output in outputs)

    def abort(self) -> None:
        """Drop all requests in flight."""
        names, self._in_flight = list(self._in_flight), {}
        if names:
            self._llm.abort_request(names)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """One response per request, in their order; raises what `add` raises."""
        if self._in_flight:
            raise RuntimeError("generate was called with other requests in flight")
        done: dict[int, Trajectory] = {}
        try:
            self.add(dict(enumerate(requests)), sampling, version)
            while self._in_flight:
                done |= self.step()
        finally:
            self.abort()
        return [done[i] for i in range(len(requests))]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """[T - 1] log p(token t | tokens before t) for t = 1 .. T - 1, at temperature 1, in nats.

        For checks; no request may be in flight.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._require_whole()
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        with self._thread_count():
            self._llm.add_request(self._name(), TokensPrompt(prompt_token_ids=list(token_ids)), parameters)
            outputs: list[Any] = []
            while not outputs:
                outputs = self._llm.step()
        steps = zip(outputs[0].prompt_logprobs[1:], token_ids[1:], strict=True)
        return np.asarray([step[token].logprob for step, token in steps], dtype=np.float32)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights.

        Responses in flight keep their tokens and go on under the new weights. These first recompute the keys and values
        of what was sampled so far. Further tokens are stamped with `version`. A response of five tokens may so have
        versions 3 3 3 4 4.

        Names and shapes are checked before anything is touched: after such an error the old weights go on serving.
        After any later error the engine refuses all further work.

        Args:
            tensors: every parameter of the same architecture, by its Hugging Face name.

        Raises:
            WeightSyncError: tensors are missing, unknown or of another shape; or the load failed half-way.
        """
        from actors.rollouts.engine_weights import reload

        self._require_whole()
        weights = self._layout.validated(tensors)
        self._broken = "a weight load did not finish"
        try:
            with self._thread_count():
                self._llm.collective_rpc(reload, args=(weights,))
                # Keys and values of the old weights would poison every prompt that shares a prefix with them.
                if not self._llm.reset_prefix_cache(reset_running_requests=True):
                    raise RuntimeError("the prefix cache could not be reset: requests still hold blocks")
        except BaseException as error:
            self._broken = f"a weight load failed half-way ({type(error).__name__}: {one_line(error)[:200]})"
            raise WeightSyncError(f"{self._broken}; restart the generator") from error
        for running in self._in_flight.values():
            sampled = self._llm.output_processor.request_states[running.vllm_id].detokenizer.num_output_tokens()
            running.versions += [running.version] * (sampled - len(running.versions))
            running.version = version
        self._broken = None

    def close(self) -> None:
        """Free the model and its KV cache; the engine cannot be used afterwards."""
        self._broken = "it was closed"
        self._llm.engine_core.shutdown()
        del self._llm

    def _name(self) -> str:
        self._requests += 1
        return str(self._requests)

    def _finished(self, output: Any) -> tuple[int, Trajectory]:
        running = self._in_flight.pop(output.request_id)
        request, sample = running.request, output.outputs[0]
        ids = np.asarray(sample.token_ids, dtype=np.int64)
        logprobs = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        versions = np.full(len(ids), running.version, dtype=np.int64)
        versions[: len(running.versions)] = running.versions
        return running.ticket, Trajectory(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=ids,
            generator_logprobs=np.asarray(logprobs, dtype=np.float32),
            versions=versions,
            finish_reason="eos" if int(ids[-1]) in running.sampling.ends else "length",
            minimum=running.sampling.minimum,
        )

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


def _keep_transformers_classes() -> None:
    """Keep vLLM from preparing classes of transformers for its compiler, which is not used on a CPU.

    vLLM serves families that it has no code for, such as GPT-NeoX, by transformers' own modules. It changes their class
    for the whole process, and then nobody but vLLM can make such a model: not the learner either, with `--local`.
    """
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_for_torch_compile = lambda self: None
