"""All records of one run: read once, split, and as token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayrlhf.config import Config
from rayrlhf.config_data import Sources
from rayrlhf.config_rewards import JudgeReward
from rayrlhf.data.comparisons import Answers, from_comparisons
from rayrlhf.data.labelled import group_answers
from rayrlhf.data.loading import Split
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.records import Demonstration, Prompt
from rayrlhf.data.sources import DataSet, Found, P, Rendering, one_each
from rayrlhf.data.splits import Splits, check_disjoint, split_train, split_valid
from rayrlhf.data.stored import Records
from rayrlhf.data.tokens import encode_responses
from rayrlhf.errors import UserError
from rayrlhf.terminal import say

_SPLITS: tuple[Split, ...] = ("train", "valid")
KINDS = ("demonstrations", "comparisons", "prompts")
"""The keys of `data` that name sources."""


class RunData:
    """The records that a config names. Each source is read when it is first asked for."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None] = say) -> None:
        """Note what to read.

        Args:
            config: of the run.
            tokenizer: of its model.
            say: takes the lines about what was read.
        """
        self.config, self.tokenizer, self.say = config, tokenizer, say
        self.rendering = Rendering(tokenizer, config.data.max_prompt_tokens, config.data.system_prompt)

    def read(self, kinds: Collection[str] = KINDS) -> None:
        """Read all of these kinds now, so that mistakes in the data show before anything starts.

        A line for each source and split says how many records it has, and how many were dropped, cut or are unused.

        Raises:
            UserError: a file that cannot be read, a malformed row, splits that overlap, no prompts for a stage, or
                records that a stage cannot use.
        """
        if "demonstrations" in kinds:
            _ = self.train  # which stays, once read
        if "comparisons" in kinds:
            _ = self.comparisons
        if self.config.has("rl") and (self.config.data.prompts or "demonstrations" in kinds):
            self._check_prompts()
        if self.config.has("evaluate") and "demonstrations" in kinds:
            _ = self.evaluated  # of the last stage: a mistake is to show before the first one
        if "demonstrations" in kinds and self.unused:
            self.say(
                f"{len(self.unused)} train demonstrations are used by no stage; data.sft_fraction=1 gives them to sft"
            )

    @cached_property
    def train(self) -> Splits[Records[Demonstration]]:
        """The training records: the shares of SFT, of the reward model, and the rest, which `rl` may have."""
        data = self.config.data
        train, valid = self._demonstrations
        splits = split_train(
            train.keys,
            data,
            reward_model=self._learns and (self._collects or data.reward_model_fraction > 0),
            rl=self._rl_has_the_rest or not self._collects,
        )
        check_disjoint(sft=splits.sft, reward_model=splits.reward_model, rl=splits.rl, valid=valid.keys)
        return Splits(train.at(splits.sft), train.at(splits.reward_model), train.at(splits.rl))

    @property
    def demonstrations(self) -> Records[Demonstration]:
        """All training records, whichever stage learns from them."""
        return self._demonstrations[0]

    @property
    def dev(self) -> Records[Demonstration]:
        """The validation records by which SFT's checkpoint is chosen."""
        return self._valid[0]

    @property
    def test(self) -> Records[Demonstration]:
        """The validation records that only the final evaluation reads."""
        return self._valid[1]

    @cached_property
    def collect(self) -> Records[Demonstration]:
        """The prompts to which the stage `collect` may sample answers, each once."""
        return self.once(self.train.reward_model)

    @cached_property
    def rl(self) -> Records[Any]:
        """The prompts of `rl`, each once."""
        return self.once(self._rl_rows)

    @cached_property
    def evaluated(self) -> Records[Any]:
        """The prompts of `evaluate.prompts`, or the held-out ones of `evaluate.split`, each once: those of
        `data.prompts`, or else of the demonstrations.

        Raises:
            UserError: there are none, or the file cannot be read.
        """
        evaluate = self.config.evaluate
        if evaluate.prompts is None:
            found: Records[Any] = self._heldout[0 if evaluate.split == "dev" else 1]
        else:
            source = self.config.data.demonstrations[0].model_copy(update={"path": evaluate.prompts})
            found = DataSet([source], self.rendering, "prompt").prompts("all").records
        if not found:
            raise UserError(
                f"evaluate: the {evaluate.split} split is empty; change data.dev_fraction or name a file in "
                "evaluate.prompts"
            )
        return self.once(found)

    def once(self, records: Records[P]) -> Records[P]:
        """The records without those whose prompt an earlier one has.

        With an environment all stay: the same prompt may begin different games, which the reference tells apart.
        """
        return one_each(records) if self.config.environment is None else records

    @cached_property
    def rl_dev(self) -> Records[Any]:
        """The held-out prompts that the policy may answer while `rl` trains it, each once."""
        return self.once(self._heldout[0])

    @property
    def _heldout(self) -> tuple[Records[Any], Records[Any]]:
        """Dev and test of the prompts of `rl`."""
        return self._valid if self._prompts is None else self._dev_and_test(self._prompts[1])

    @property
    def unused(self) -> Records[Demonstration]:
        """The training demonstrations that no stage of the run learns from or asks for."""
        return self.train.rl[:0] if self._rl_has_the_rest else self.train.rl

    @cached_property
    def comparisons(self) -> list[Answers]:
        """The comparisons or labelled answers of `data.comparisons`, its validation split held out; none without it."""
        source = self.config.data.comparisons
        if source is None:
            return []
        found = self._opened("comparisons", source, "comparison", "labelled")
        return self._labelled(found) if found.reading.use == "labelled" else self._ranked(found)

    def prompts(self, records: Sequence[Prompt]) -> list[EncodedPrompt]:
        """The prompts of `records` as token ids."""
        if self.config.environment is None:
            return [EncodedPrompt(record.id, record.ids) for record in records]
        return [EncodedPrompt(record.id, record.ids, record.text, record.reference) for record in records]

    def responses(self, records: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """The references of `records`, which all have one, as token ids that follow the prompts."""
        return [record.response_ids[0][: self.config.data.max_response_tokens] for record in records]

    def as_responses(self, records: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Other texts in the place of the references of `records`."""
        prompts = [record.text for record in records]
        return encode_responses(self.tokenizer, texts, self.config.data.max_response_tokens, prompts)

    # ---- sources

    @property
    def _collects(self) -> bool:
        """Whether the run has answers sampled and ranked."""
        return self._learns and self.config.data.comparisons is None

    @property
    def _learns(self) -> bool:
        return self.config.trains_reward_model or self.config.has("dpo")

    @property
    def _rl_has_the_rest(self) -> bool:
        """Whether `rl` asks for the training prompts that no other stage takes."""
        data = self.config.data
        return self.config.has("rl") and data.prompts is None and data.rl_prompts != "sft"

    @property
    def _rl_rows(self) -> Records[Any]:
        if self._prompts is not None:
            return self._prompts[0]
        shares = {"rest": self.train.rl, "sft": self.train.sft, "all": self._demonstrations[0]}
        return shares[self.config.data.rl_prompts]

    @cached_property
    def _demonstrations(self) -> tuple[Records[Demonstration], Records[Demonstration]]:
        data = self.config.data
        source = self._opened("demonstrations", data.demonstrations, "demonstration")
        found = [source.demonstrations(split) for split in _SPLITS]
        for split, own in zip(_SPLITS, found, strict=True):
            self._say(f"{len(own.records)} {split} demonstrations", source, own, own.dropped)
        return found[0].records, found[1].records

    @cached_property
    def _valid(self) -> tuple[Records[Demonstration], Records[Demonstration]]:
        return self._dev_and_test(self._demonstrations[1])

    def _dev_and_test(self, records: Records[P]) -> tuple[Records[P], Records[P]]:
        dev, test = split_valid(records.keys, self.config.data)
        return records.at(dev), records.at(test)

    @cached_property
    def _prompts(self) -> tuple[Records[Prompt], Records[Prompt]] | None:
        """The training and the validation prompts of `data.prompts`."""
        if self.config.data.prompts is None:
            return None
        source = self._opened("prompts", self.config.data.prompts, "prompt")
        found = [source.prompts(split) for split in _SPLITS]
        for split, own in zip(_SPLITS, found, strict=True):
            self._say(f"{len(own.records)} {split} prompts", source, own, own.dropped)
        return found[0].records, found[1].records

    def _opened(self, key: str, sources: Sources, *uses: Any) -> DataSet:
        source = DataSet(sources, self.rendering, *uses)
        for remark in source.remarks:
            self.say(f"data.{key}: {remark}")
        return source

    def _ranked(self, source: DataSet) -> list[Answers]:
        data, ranked = self.config.data, list[Answers]()
        for split in _SPLITS:
            found = source.comparisons(split)
            own = from_comparisons(found.records, data.max_response_tokens, heldout=split == "valid")
            dropped = dict(found.dropped)
            if len(own) < len(found.records):
                dropped["equal_when_cut"] = len(found.records) - len(own)
            self._say(f"{len(own)} {split} comparisons", source, found, dropped)
            ranked += own
        return ranked

    def _labelled(self, source: DataSet) -> list[Answers]:
        data, config, labelled = self.config.data, self.config, list[Answers]()
        kind = ", ".join(dict.fromkeys(each.name for each in source.reading.sources))
        single = f"data.comparisons: format {kind!r} has single answers with a label, and"
        if config.trains_reward_model:
            raise UserError(
                f"{single} the reward model learns from pairs; give ranked answers in another format, or leave the "
                "reward model out: stages=[sft, dpo, evaluate] with dpo.loss=kto"
            )
        if config.has("dpo") and not config.dpo.takes_labels:
            raise UserError(f"{single} dpo.loss={config.dpo.loss} learns from pairs; set dpo.loss=kto")
        for split in _SPLITS:
            found = source.labelled(split)
            own, contradictory = group_answers(found.records, data.max_response_tokens, heldout=split == "valid")
            if not own:
                raise UserError(
                    f"{source.reading.paths}: all answers of split {split!r} are called good by one row and bad by "
                    "another; keep one label for each answer"
                )
            good, bad = _sides(own)
            counts = f"{len(own)} {split} prompts with {good} good and {bad} bad answers"
            self._say(counts, source, found, {**found.dropped, **contradictory})
            labelled += own
        train = [c for c in labelled if not c.heldout]
        if config.has("dpo") and (advice := config.dpo.balance(*_sides(train[: config.dpo.max_comparisons]))):
            self.say(advice)
        return labelled

    def _check_prompts(self) -> None:
        """
        Raises:
            UserError: `rl` has no prompts, or a reward compares with references that are not there.
        """
        if not self.rl:
            raise UserError(
                "rl: no prompts are left; lower data.sft_fraction or data.reward_model_fraction, or set data.prompts"
            )
        if len(self.rl) < len(self._rl_rows):
            self.say(f"rl asks {len(self.rl)} prompts, each once, of {len(self._rl_rows)} rows")
        bare = sum(reference is None for reference in self.rl.column("reference"))
        if not bare:
            return
        for reward in self.config.rewards:
            if isinstance(reward, JudgeReward) and reward.compare == "reference":
                raise UserError(
                    f"rewards: {reward.name!r} compares with the prompt's reference, and {bare} of {len(self.rl)} "
                    "prompts of rl have none; set compare: nothing, or give them a response"
                )
        self.say(
            f"{bare} of {len(self.rl)} prompts of rl have no reference: what compares with one, such as gold by ROUGE, "
            "leaves them out"
        )

    def _say(self, counts: str, source: DataSet, found: Found[Any], dropped: Mapping[str, int]) -> None:
        """One line about a split: its records, what was dropped, and what is cut."""
        data = self.config.data
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none"
        answers = int((found.records.lengths() > data.max_response_tokens).sum())
        line = f"{counts} from {source.reading.paths}; dropped: {reasons}"
        if found.longer:
            line += f"; {found.longer} prompts cut to data.max_prompt_tokens={data.max_prompt_tokens}"
        if answers:
            line += f"; {answers} responses cut to data.max_response_tokens={data.max_response_tokens}"
        if found.mended:
            line += f"; {found.mended} rows had characters that are none, U+FFFD stands for them"
        if found.odd:
            line += f"; {found.odd} rows had values beyond Python's range, such as far dates, now text"
        if found.cleared:
            line += f"; {found.cleared} lost texts that spell special tokens or open a turn"
        if found.cached:
            line += "; from the cache of tokenised data"
        self.say(line)


def _sides(answers: Sequence[Answers]) -> tuple[int, int]:
    """How many labelled answers are good, and how many are bad."""
    good, bad = (sum(each.counts[side] for each in answers) for side in ("good answers", "bad answers"))
    return good, bad
