"""A language model that answers a person: one response at a time, streamed as it is written.

transformers generates. A CPU has it ready seconds after the start, where vLLM takes a quarter of a minute, and one
reader needs no batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from rayrlhf.models.loading import load_policy


@dataclass(frozen=True)
class Draw:
    """How a response is drawn."""

    temperature: float
    """0: the likeliest token each time."""
    seed: int
    max_tokens: int
    min_tokens: int
    ends: tuple[int, ...]
    """Token ids of which the first one ends the response."""


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits / temperature, so that the largest is a sample of their softmax (Gumbel 1954).

    The noise comes from a generator of its own. transformers would draw from torch's global one, which models that
    answer at the same time have in common: their answers would not repeat.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # -log E of an exponential E is a Gumbel variable.
        exponential = torch.empty(scores.shape).exponential_(generator=self.generator).to(scores.device)
        return scores.float() / self.temperature - exponential.log()


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Answer:
    """A response while it is written, by a thread of its own. Iterating gives its text piece by piece."""

    def __init__(self, model: AnsweringModel, prompt_ids: Sequence[int], draw: Draw) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.ids: tuple[int, ...] = ()
        """Of the response, with the token that ended it; known when the iteration is over."""
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._model, self._draw = model, draw
        self._streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(target=self._write, name=f"{model.name} answers", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        yield from self._streamer
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the response behind the token that is being computed."""
        self._stop.set()

    def _write(self) -> None:
        draw = self._draw
        processors = LogitsProcessorList()
        if draw.temperature > 0:
            processors.append(GumbelNoise(draw.temperature, draw.seed))
        settings = GenerationConfig(
            do_sample=False,  # the largest logit, noise included
            max_new_tokens=draw.max_tokens,
            min_new_tokens=draw.min_tokens or None,
            eos_token_id=list(draw.ends),
            pad_token_id=self._model.tokenizer.pad_token_id,
        )
        ids = torch.tensor([self.prompt_ids], device=self._model.model.device)
        try:
            with torch.inference_mode():
                written = self._model.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    logits_processor=processors,
                    stopping_criteria=StoppingCriteriaList([_Stopped(self._stop)]),
                    streamer=self._streamer,
                )
            self.ids = tuple(written[0, len(self.prompt_ids) :].tolist())
        except BaseException as error:
            self._error = error
            self._streamer.end()


class AnsweringModel:
    """A language model with its tokenizer."""

    def __init__(self, name: str, path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None) -> None:
        """Load the model in a directory, or of a name on the hub; see `load_policy` for errors."""
        self.name, self.tokenizer = name, tokenizer
        self.model: Any = load_policy(path, revision).requires_grad_(False)

    def answer(self, prompt_ids: Sequence[int], draw: Draw) -> Answer:
        """Begin a response; prompt and response have to fit the model's context."""
        return Answer(self, prompt_ids, draw)


def read_together(answers: dict[str, Answer], show: Callable[[str, str], None]) -> None:
    """Read several responses at the same time.

    Args:
        answers: by the names of their models.
        show: gets each piece of text with the name of its model, in the calling thread.

    Raises:
        KeyboardInterrupt: Ctrl-C, after which all responses have ended.
    """
    pieces: queue.SimpleQueue[tuple[str, str | BaseException | None]] = queue.SimpleQueue()

    def read(name: str) -> None:
        try:
            for piece in answers[name]:
                pieces.put((name, piece))
            pieces.put((name, None))
        except BaseException as error:
            pieces.put((name, error))

    threads = [threading.Thread(target=read, args=(name,), daemon=True) for name in answers]
    for thread in threads:
        thread.start()
    try:
        reading = len(threads)
        while reading:
            name, piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                reading -= 1
            else:
                show(name, piece)
    finally:
        for answer in answers.values():
            answer.stop()
        for thread in threads:
            thread.join()
