"""All records of one run: read once, split, and as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rayrlhf.config import Config, DatasetConfig
from rayrlhf.data.comparisons import Answers, from_comparisons
from rayrlhf.data.labelled import group_answers
from rayrlhf.data.loading import Split
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.records import Demonstration
from rayrlhf.data.sources import holds_labels, read_demonstrations, read_labelled, read_published
from rayrlhf.data.splits import Splits, check_disjoint, split_train, split_valid
from rayrlhf.data.tokens import encode_prompts, encode_responses
from rayrlhf.errors import UserError

_SPLITS: tuple[Split, ...] = ("train", "valid")


class RunData:
    """The records that a config names. Each source is read when it is first asked for."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer

    def read(self) -> None:
        """Read everything now, so that mistakes in the data show before anything starts.

        Raises:
            UserError: a file that cannot be read, a malformed row, splits that overlap, or labelled answers for a
                stage that needs pairs.
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
    def comparisons(self) -> list[Answers]:
        """The comparisons or labelled answers of `data.comparisons`, its validation split held out; none without it."""
        source = self.config.data.comparisons
        if source is None:
            return []
        return self._labelled(source) if holds_labels(source) else self._ranked(source)

    def _ranked(self, source: DatasetConfig) -> list[Answers]:
        data, ranked = self.config.data, list[Answers]()
        for split in _SPLITS:
            found, dropped = read_published(source, split, self.tokenizer, data.max_prompt_tokens)
            own = from_comparisons(found, self.tokenizer, data.max_response_tokens, heldout=split == "valid")
            if len(own) < len(found):
                dropped["equal_when_cut"] = len(found) - len(own)
            _say(f"{len(own)} {split} comparisons", source, dropped)
            ranked += own
        return ranked

    def _labelled(self, source: DatasetConfig) -> list[Answers]:
        data, config, labelled = self.config.data, self.config, list[Answers]()
        single = f"data.comparisons: format {source.format!r} has single answers with a label, and"
        if config.trains_reward_model:
            raise UserError(
                f"{single} the reward model learns from pairs; give ranked answers in another format, or leave the "
                "reward model out: stages=[sft, dpo, evaluate] with dpo.loss=kto"
            )
        if config.has("dpo") and not config.dpo.takes_labels:
            raise UserError(f"{single} dpo.loss={config.dpo.loss} learns from pairs; set dpo.loss=kto")
        for split in _SPLITS:
            found, dropped = read_labelled(source, split, self.tokenizer, data.max_prompt_tokens)
            own, contradictory = group_answers(
                found, self.tokenizer, data.max_response_tokens, heldout=split == "valid"
            )
            if not own:
                raise UserError(
                    f"{source.path}: all answers of split {split!r} are called good by one row and bad by another; "
                    "keep one label for each answer"
                )
            good, bad = _sides(own)
            counts = f"{len(own)} {split} prompts with {good} good and {bad} bad answers"
            _say(counts, source, {**dropped, **contradictory})
            labelled += own
        train = [c for c in labelled if not c.heldout]
        if config.has("dpo") and (advice := config.dpo.balance(*_sides(train[: config.dpo.max_comparisons]))):
            print(advice, flush=True)
        return labelled

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


def _sides(answers: Sequence[Answers]) -> tuple[int, int]:
    """How many labelled answers are good, and how many are bad."""
    good, bad = (sum(each.counts[side] for each in answers) for side in ("good answers", "bad answers"))
    return good, bad


def _say(found: str, source: DatasetConfig, dropped: Mapping[str, int]) -> None:
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none"
    print(f"{found} from {source.path}; dropped: {counts}", flush=True)
