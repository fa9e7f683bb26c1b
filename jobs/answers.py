"""The models of a run, loaded to answer what a person types: for `rayrlhf chat` and `Run.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import check_context, sampling_of
from rayrlhf.data.typed import Typist, check_template, template_of
from rayrlhf.errors import UserError
from rayrlhf.models.answering import Answer, AnsweringModel, Draw
from rayrlhf.models.ends import with_ends
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import context_length, load_reward_model, load_tokenizer
from rayrlhf.runs.folder import RunFolder, stored_config
from rayrlhf.runs.models import reward_model_of
from rayrlhf.runs.reading import read_table
from rayrlhf.runs.storage import local_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayrlhf.data.records import Message


class Answering:
    """Some of a run's models, what they are asked by, and how their answers are drawn."""

    def __init__(
        self,
        run: RunFolder,
        models: Mapping[str, str],
        template: str | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        score: bool = False,
    ) -> None:
        """
        Args:
            run: with the config, and with prompts that tell the template.
            models: addresses by name, see `rayrlhf.runs.models.chosen`.
            template: of `rayrlhf.data.typed.TEMPLATES`; None for that of the run's prompts.
            system: a system prompt; None for the run's own.
            max_tokens: of an answer; None for the run's.
            temperature: None for that of `rl`.
            score: also load the run's reward model.

        Raises:
            UserError: an option does not fit, or a model cannot be loaded.
        """
        if template is not None:
            check_template(template)
        reward = reward_model_of(run) if score else None
        if score and reward is None:
            raise UserError(f"{run.address}: the run has no reward model (yet), so --score has nothing to show")
        config = stored_config(run)
        first = local_copy(next(iter(models.values())))
        self.tokenizer = load_tokenizer(first, config.model.revision)
        config, _ = with_ends(config, first, self.tokenizer)
        sampling = sampling_of(self.tokenizer, config.data, config.rl.draw)
        self.draw = Draw(
            sampling.temperature if temperature is None else temperature,
            0,
            sampling.max_tokens if max_tokens is None else max_tokens,
            sampling.min_tokens,
            sampling.ends,
        )
        if self.draw.temperature < 0 or self.draw.max_tokens < 1:
            raise UserError("--temperature must be 0 or more, and --max-tokens 1 or more")
        context = context_length(first)
        check_context(1, self.draw.max_tokens, context)
        self.examples = examples_of(run)
        """Rows of samples.parquet: prompts that no model was trained on, with a person's answer."""
        self.typist = Typist(
            self.tokenizer,
            template or template_of_run(run, self.tokenizer),
            context - self.draw.max_tokens,
            config.data.system_prompt if system is None else system,
        )
        revision = config.model.revision  # of a base on the hub; directories have none
        self.models = {
            name: AnsweringModel(name, local_copy(path), self.tokenizer, revision) for name, path in models.items()
        }
        self._reward = None
        if reward is not None:
            self._reward = Forward(
                load_reward_model(local_copy(reward)).requires_grad_(False),
                pad_token_id=int(self.tokenizer.pad_token_id),
                max_tokens=context,
                dtype=config.model.dtype,
            )

    def prompt(self, typed: str, before: Sequence[Message] = ()) -> tuple[tuple[int, ...], bool]:
        """See `Typist.prompt`."""
        return self.typist.prompt(typed, before)

    def begin(self, prompts: Mapping[str, Sequence[int]], temperature: float, seed: int) -> dict[str, Answer]:
        """Have each model begin its answer to a prompt of its own."""
        draw = replace(self.draw, temperature=temperature, seed=seed)
        return {name: self.models[name].answer(ids, draw) for name, ids in prompts.items()}

    def scores(self, answers: Mapping[str, Answer]) -> dict[str, float]:
        """What the reward model gives to answers that are written; nothing without a reward model."""
        written = {name: answer for name, answer in answers.items() if answer.ids}
        if self._reward is None or not written:
            return {}
        rows = [Row.completion(answer.prompt_ids, answer.ids) for answer in written.values()]
        return dict(zip(written, self._reward.row_scores(rows), strict=True))


def template_of_run(run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of the run's own prompts, see `rayrlhf.data.typed.template_of`."""
    system = stored_config(run).data.system_prompt
    posts = [row["post"].removeprefix(f"{system}\n\n") for row in examples_of(run)]
    return template_of(tokenizer, posts)


def examples_of(run: RunFolder) -> list[dict[str, Any]]:
    """Prompts and their references of samples.parquet, as `post` and `reference`; none of a run without evaluation."""
    content = run.read(run.samples)
    if content is None:
        return []
    table = read_table(content, run.address_of(run.samples), "post", "reference")
    return list(table.select(["post", "reference"]).to_pylist())
