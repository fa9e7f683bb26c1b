"""A reward by a model from elsewhere: it reads the text of prompt and response by its own tokenizer.

With a chat template the prompt's dialogue and the response are its messages; a prompt that is a text is one user's
turn. Without one, the response stands behind the prompt's text. What is too long loses the beginning of the prompt.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from rayrlhf.config_resources import ScorerConfig
from rayrlhf.config_rewards import ModelReward
from rayrlhf.data.records import Message
from rayrlhf.data.template import ChatPrompt
from rayrlhf.data.tokens import message_cleaner, special_text_remover
from rayrlhf.errors import UserError, one_line
from rayrlhf.rewards.base import TextReward
from rayrlhf.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayrlhf.models.classifier import Classifier

CUT = "prompts_cut/"
"""Before the reward's name, what `Trajectory.counted` calls a prompt whose beginning the model did not read."""
BYTES = {"float32": 4, "bfloat16": 2}
"""Of a weight."""


class Exchange(NamedTuple):
    """What the model is to judge."""

    prompt: str
    """The prompt as the policy has read it; it counts where there are no messages."""
    messages: Sequence[Message]
    """The dialogue that the prompt renders, or none."""
    response: str


class Reader:
    """Turns exchanges into the token ids of a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, suffix: str = "") -> None:
        """
        Args:
            tokenizer: the model's own.
            context: the most tokens that it takes.
            suffix: stands behind every text.
        """
        self.tokenizer, self.context, self.suffix = tokenizer, context, suffix
        self._remove, self._clean_turn = special_text_remover(tokenizer), message_cleaner(tokenizer)

    def row(self, exchange: Exchange) -> tuple[list[int], bool]:
        """The token ids of an exchange, at most `context`, and whether something was left out for that.

        What is too long keeps as much of the end of the prompt as fits; a response that is too long keeps its end.

        Raises:
            TemplateError: the chat template refuses the dialogue.
        """
        exchange = self._clean(exchange)
        whole = self._ids(exchange)
        if len(whole) <= self.context:
            return whole, False
        length = sum(len(content) for _, content in exchange.messages)
        skipped = bisect.bisect_left(
            range(length), True, key=lambda skipped: len(self._ids(exchange, skipped)) <= self.context
        )
        return self._ids(exchange, skipped)[-self.context :], True

    def _clean(self, exchange: Exchange) -> Exchange:
        """Without texts that this tokenizer would take for special tokens; a prompt without messages is one message."""
        messages = tuple(Message(role, self._clean_turn(content)) for role, content in exchange.messages)
        prompt = self._remove(exchange.prompt)
        if not self.tokenizer.chat_template:
            messages = (Message("user", ChatPrompt(messages).text if messages else prompt),)
        return Exchange(
            prompt, messages or (Message("user", self._clean_turn(prompt)),), self._remove(exchange.response).strip()
        )

    def _ids(self, exchange: Exchange, skipped: int = 0) -> list[int]:
        """Of a clean exchange, without the first `skipped` characters of the prompt."""
        turns = _without(exchange.messages, skipped)
        templated = bool(self.tokenizer.chat_template)
        if templated:
            conversation = [message._asdict() for message in (*turns, Message("assistant", exchange.response))]
            text = str(self.tokenizer.apply_chat_template(conversation, tokenize=False))
        else:
            prompt = turns[0].content
            space = "" if not prompt or prompt[-1].isspace() else " "  # as between the policy's prompt and response
            text = prompt + space + exchange.response
        # A template has spelt the special tokens already; a plain text gets those that the tokenizer adds by itself.
        encoded = self.tokenizer(
            text + self.suffix, add_special_tokens=not templated, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])


class PretrainedModel(TextReward):
    """One model; it is loaded where it scores."""

    reward: ModelReward

    def __init__(self, reward: ModelReward, path: str, output: int, parameters: int) -> None:
        """
        Args:
            reward: its section of the config.
            path: where it is, as `rayrlhf.models.loading.resolve_model` says.
            output: index of the output that is the score.
            parameters: how many it has.
        """
        self.reward, self.path, self.output = reward, path, output
        self.bytes = parameters * BYTES[reward.dtype]
        self._loaded: tuple[Classifier, Reader] | None = None

    @classmethod
    def find(cls, reward: ModelReward) -> PretrainedModel:
        """The model that a section names, looked at and not loaded.

        Raises:
            UserError: there is none, or it gives no score, see `rayrlhf.models.classifier.inspect_classifier`.
        """
        from rayrlhf.models.classifier import inspect_classifier
        from rayrlhf.models.loading import resolve_model

        assert reward.path is not None, "the trained one is no text reward"
        try:
            path = resolve_model(reward.path)
            facts = inspect_classifier(path, reward.revision, reward.label)
        except UserError as error:
            raise UserError(f"reward {reward.name!r}: {error}") from None
        return cls(reward, path, facts.output, facts.parameters)

    @property
    def place(self) -> str:
        return f"reward {self.reward.name!r} (model {self.path})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights, which a scorer reads by itself."""
        return self.__dict__ | {"_loaded": None}

    def start(self, settings: ScorerConfig) -> None:
        # Here, because the coordinator imports this file, too: torch takes seconds.
        from rayrlhf.models.classifier import Classifier
        from rayrlhf.models.loading import resolve_model

        if self._loaded is not None:
            return
        try:
            classifier = Classifier(
                resolve_model(self.path), self.reward.revision, self.output, dtype=self.reward.dtype,
                device="cuda" if settings.gpus else "cpu", max_tokens=settings.micro_batch_tokens,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"reward {self.reward.name!r}: {error}") from None
        self._loaded = classifier, Reader(classifier.tokenizer, classifier.context, self.reward.suffix)

    def __call__(self, trajectories: Sequence[Trajectory], told: Mapping[str, Sequence[Any]]) -> list[float]:
        assert self._loaded is not None, "start comes first"
        classifier, reader = self._loaded
        rows = []
        exchanges = map(Exchange, told["prompts"], told["messages"], told["responses"])
        for trajectory, exchange in zip(trajectories, exchanges, strict=True):
            try:
                ids, cut = reader.row(exchange)
            except TemplateError as error:
                raise UserError(
                    f"{self.place}: its chat template refuses prompt {trajectory.prompt_id!r}: {one_line(error)}"
                ) from None
            rows.append(ids)
            trajectory.counted[CUT + self.reward.name] = int(cut)
        scores = classifier.scores(rows)
        for trajectory, score in zip(trajectories, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(
                    f"{self.place} gave {score} to prompt {trajectory.prompt_id!r}, sample {trajectory.sample_index}; "
                    "with dtype: bfloat16, try float32"
                )
        return scores


def _without(messages: Sequence[Message], skipped: int) -> list[Message]:
    """A dialogue without the first characters of its turns. System messages stay, and the user's last turn."""
    if not skipped:
        return list(messages)
    system = [message for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    while len(turns) > 1 and skipped >= len(turns[0].content):
        skipped -= len(turns.pop(0).content)
    turns[0] = Message(turns[0].role, turns[0].content[skipped:])
    while turns[0].role == "assistant":  # many chat templates refuse a dialogue that starts with one
        turns.pop(0)
    return [*system, *turns]
