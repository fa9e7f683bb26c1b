"""All records of one run: read once, split, and as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rayrlhf.config import Config
from rayrlhf.data.comparisons import RankedAnswers, from_comparisons
from rayrlhf.data.loading import Split
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.records import Demonstration
from rayrlhf.data.sources import read_demonstrations, read_published
from rayrlhf.data.splits import Splits, check_disjoint, split_train, split_valid
from rayrlhf.data.tokens import encode_prompts, encode_responses


class RunData:
    """The records that a config names. Each source is read when it is first asked for."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer

    def read(self) -> None:
        """Read everything now, so that mistakes in the data show before anything starts.

        Raises:
            UserError: a file that cannot be read, a malformed row, or splits that overlap.
        """
        _ = self.train, self.comparisons  # which stay, once read

    @cached_property
    def train(self) -> Splits[Demonstration]:
        """The training records: the shares of SFT, of the reward model, and the prompts of `rl`."""
        config = self.config
        learns_from_comparisons = config.trains_reward_model or config.has("dpo")
        splits = split_train(
            self._demonstrations("train"), config.data, reward_model=learns_from_comparisons, rl=config.has("rl")
        )
        check_disjoint(sft=splits.sft, reward_model=splits.reward_model, rl=splits.rl, dev=self.dev, test=self.test)
        return splits

    @property
    def dev(self) -> list[Demonstration]:
        """The validation records that something is chosen by."""
        return self._valid[0]

    @property
    def test(self) -> list[Demonstration]:
        """The validation records that only the final evaluation reads."""
        return self._valid[1]

    @property
    def evaluated(self) -> list[Demonstration]:
        """The records of `evaluate.split`."""
        return self.dev if self.config.evaluate.split == "dev" else self.test

    @cached_property
    def comparisons(self) -> list[RankedAnswers]:
        """The comparisons of `data.comparisons`, its validation split held out; none without it."""
        data = self.config.data
        if data.comparisons is None:
            return []
        ranked: list[RankedAnswers] = []
        splits: tuple[Split, ...] = ("train", "valid")
        for split in splits:
            found, dropped = read_published(data.comparisons, split, self.tokenizer, data.max_prompt_tokens)
            own = from_comparisons(found, self.tokenizer, data.max_response_tokens, heldout=split == "valid")
            if len(own) < len(found):
                dropped["equal_when_cut"] = len(found) - len(own)
            counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none"
            print(f"{len(own)} {split} comparisons from {data.comparisons.path}; dropped: {counts}", flush=True)
            ranked += own
        return ranked

    def prompts(self, records: Sequence[Demonstration]) -> list[EncodedPrompt]:
        """The prompts of `records` as token ids."""
        ids = encode_prompts(self.tokenizer, [record.prompt for record in records])
        if self.config.environment is None:
            return [EncodedPrompt(record.id, tuple(own)) for record, own in zip(records, ids, strict=True)]
        return [
            EncodedPrompt(record.id, tuple(own), record.prompt, record.response)
            for record, own in zip(records, ids, strict=True)
        ]

    def responses(self, records: Sequence[Demonstration], texts: Sequence[str] | None = None) -> list[list[int]]:
        """The responses of `records`, or other `texts` in their place, as token ids that follow the prompts."""
        texts = [record.response for record in records] if texts is None else texts
        prompts = [record.prompt for record in records]
        return encode_responses(self.tokenizer, texts, self.config.data.max_response_tokens, prompts)

    @cached_property
    def _valid(self) -> tuple[list[Demonstration], list[Demonstration]]:
        return split_valid(self._demonstrations("valid"), self.config.data)

    def _demonstrations(self, split: Split) -> list[Demonstration]:
        data = self.config.data
        return read_demonstrations(data.demonstrations, split, self.tokenizer, data.max_prompt_tokens)
