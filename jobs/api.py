"""Python's way to what the commands do: start a run, and look at one as data frames.

>>> from rayrlhf import Run                                     # doctest: +SKIP
>>> Run("runs/quickstart").evaluation.loc["policy", "gold"]     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from rayrlhf.config import Config
from rayrlhf.errors import UserError
from rayrlhf.reports.results import read_evaluation
from rayrlhf.runs.addresses import join, runs_address
from rayrlhf.runs.folder import RunFolder, stored_config
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.models import chosen, open_run, policies_of
from rayrlhf.runs.reading import read_table

if TYPE_CHECKING:
    from jobs.answers import Answering


def run(config: Config, local: bool = False) -> Run:
    """Do what `rayrlhf run` does: all stages of a config; finished ones are skipped, an interrupted run continues.

    Args:
        config: see `load_config`.
        local: everything in this process, without Ray.

    Raises:
        UserError: a mistake in the config or the data.
    """
    from jobs.cluster import inside_job
    from jobs.pipeline import run_all

    run_all(config, local)
    return Run(join(runs_address(config.runs_dir, inside_job()), config.name))


class Run:
    """A run's folder, finished or under way; of a run in rounds, its newest round."""

    def __init__(self, address: str | Path) -> None:
        """
        Args:
            address: of the folder, a path or a URI.

        Raises:
            UserError: there is no run.
        """
        self.folder: RunFolder = open_run(str(address))
        self._answering: dict[tuple[Any, ...], Answering] = {}

    def __repr__(self) -> str:
        return f"Run({self.folder.address!r})"

    @property
    def config(self) -> Config:
        """The config of record."""
        return stored_config(self.folder)

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each stage and step, a column for each number; NaN where a step has none of that name."""
        texts = ("sample", "note", "warnings", "non_finite")
        lines = [{k: v for k, v in line.items() if k not in texts} for line in read_metrics(self.folder.address)]
        return pd.DataFrame(lines, columns=list(dict.fromkeys(["stage", "step", *(k for li in lines for k in li)])))

    @property
    def evaluation(self) -> pd.DataFrame:
        """Means with their 95 % intervals: `mean`, `low`, `high`, `n` by source (sft, policy, ...) and measure.

        Raises:
            UserError: the run is not evaluated.
        """
        result = self._evaluation()
        return _intervals({source: result[source] for source in result if source not in ("differences", "metadata")})

    @property
    def differences(self) -> pd.DataFrame:
        """Paired differences with intervals, as `evaluation` has them, by what is compared (policy_minus_sft, ...).

        Raises:
            UserError: the run is not evaluated.
        """
        return _intervals(self._evaluation().get("differences", {}))

    @property
    def samples(self) -> pd.DataFrame:
        """The evaluation's prompts with the answers of each source and their measures.

        Raises:
            UserError: the run is not evaluated.
        """
        return self._table(self.folder.samples)

    @property
    def comparisons(self) -> pd.DataFrame:
        """The ranked answers of the stage `collect`.

        Raises:
            UserError: the run has collected none.
        """
        return self._table(self.folder.comparisons)

    @property
    def models(self) -> dict[str, str]:
        """Where its language models are, by name: base, sft, dpo, policy."""
        return policies_of(self.folder)

    def generate(
        self,
        prompts: str | Sequence[str],
        models: str | None = None,
        *,
        template: str | None = None,
        system: str | None = None,
        temperature: float | None = None,
        seed: int = 0,
        max_tokens: int | None = None,
        score: bool = False,
    ) -> pd.DataFrame:
        """Answers of the run's models to prompts, as `rayrlhf chat` gives them. Prompt i has the seed `seed` + i.

        Args:
            prompts: one, or several.
            models: names with commas between; None for all but the base.
            template: chat, post or text; None for that of the run's prompts.
            system: a system prompt; None for the run's own.
            temperature: 0 takes the likeliest token; None for that of `rl`.
            seed: of the first prompt's answers.
            max_tokens: of an answer; None for the run's.
            score: add a column `NAME_reward` for each model: what the reward model gives its answer.

        Returns:
            A row for each prompt: `prompt`, and the answer of each model in a column of its name.

        Raises:
            UserError: the run has no such model, an option does not fit, or a prompt is longer than the context.
        """
        from jobs.answers import Answering
        from rayrlhf.models.answering import read_together

        key = (models, template, system, temperature, max_tokens, score)
        if key not in self._answering:  # loading takes longer than an answer
            self._answering = {
                key: Answering(
                    self.folder, chosen(self.folder, models), template, system, max_tokens, temperature, score
                )
            }
        answering = self._answering[key]
        rows = []
        for number, typed in enumerate([prompts] if isinstance(prompts, str) else prompts):
            ids, cut = answering.prompt(typed)
            if cut:
                raise UserError(f"generate: prompt {number} is longer than the model's context; shorten it")
            answers = answering.begin(dict.fromkeys(answering.models, ids), answering.draw.temperature, seed + number)
            texts = dict.fromkeys(answers, "")

            def add(name: str, piece: str, texts: dict[str, str] = texts) -> None:
                texts[name] += piece

            read_together(answers, add)
            scores = {f"{name}_reward": value for name, value in answering.scores(answers).items()}
            rows.append({"prompt": typed, **{name: text.strip() for name, text in texts.items()}, **scores})
        return pd.DataFrame(rows)

    def export(self, directory: str | Path, model: str = "policy", *, license: str | None = None) -> Path:
        """Write a model as `rayrlhf export` does; returns the directory.

        Raises:
            UserError: there is no such model, or the directory is in use.
        """
        from jobs.export import write_model

        write_model(self.folder, Path(directory), model, False, license, Path(directory).resolve().name)
        return Path(directory)

    def _evaluation(self) -> dict[str, Any]:
        found = read_evaluation(self.folder)
        if found is None:
            raise self._lacks(self.folder.evaluation)
        return found

    def _table(self, path: Path) -> pd.DataFrame:
        content = self.folder.read(path)
        if content is None:
            raise self._lacks(path)
        return read_table(content, self.folder.address_of(path)).to_pandas()

    def _lacks(self, path: Path) -> UserError:
        return UserError(f"{self.folder.address} has no {path.name} (yet)")


def _intervals(found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Rows of `mean`, `low`, `high` and what else there is, by two names; what was not measured has no row."""
    rows = {
        (outer, inner): value
        for outer, measures in found.items()
        for inner, value in (measures or {}).items()
        if isinstance(value, dict)
    }
    frame = pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=["source", "measure"]))
    return frame
