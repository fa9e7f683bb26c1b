"""A sweep: one config, some of its keys at several values, and a run for each combination, called a trial.

The sweep's folder `runs_dir/NAME` holds `base`, a run of the stages that no swept key goes into, and a folder for
each trial, which starts with those stages done. A trial is an ordinary run in every other respect.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, parse_config, parse_override, parse_section, read_yaml, set_key
from rayrlhf.errors import UserError
from rayrlhf.reports.measures import MEASURES
from rayrlhf.runs.stages import stages_from, stages_of
from rayrlhf.sections import Positive, Section
from rayrlhf.wording import names

Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar]
Range = tuple[float, float]
METRICS = (
    *(f"policy.{measure}" for measure in (*MEASURES, "win_rate_vs_reference", "win_rate_vs_sft", "kl")),
    *(f"sft.{measure}" for measure in (*MEASURES, "win_rate_vs_reference")),
    *(f"policy_minus_sft.{measure}" for measure in MEASURES),
)
"""The means of evaluation.json by which trials can be ranked."""
BASE = "base"
"""The folder of the stages that all trials share."""
_DIFFERENT_BY_TRIAL = {"name", "runs_dir"}


class Space(Section):
    """The values of one swept key; exactly one of the four fields is given."""

    grid: Annotated[list[Value], Field(min_length=1)] | None = None
    """Each of these values, in combination with every value of the other keys' grids."""
    choice: Annotated[list[Value], Field(min_length=1)] | None = None
    """A value drawn from these."""
    uniform: Range | None = None
    """A number drawn between these two."""
    loguniform: Range | None = None
    """A number drawn between these two, with its logarithm uniform: every order of magnitude is equally likely."""

    @model_validator(mode="after")
    def _one_kind(self) -> Space:
        if sum(kind is not None for kind in (self.grid, self.choice, self.uniform, self.loguniform)) != 1:
            raise ValueError("write one of {grid: [...]}, {choice: [...]}, {uniform: [low, high]}, {loguniform: ...}")
        for low, high in (bounds for bounds in (self.uniform, self.loguniform) if bounds):
            if low >= high or (self.loguniform and low <= 0):
                raise ValueError("a range is [low, high] with low < high, and low > 0 for loguniform")
        return self


class SweepConfig(Section):
    """A sweep's YAML file."""

    config: str
    """The run's YAML file, relative to the sweep's."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the sweep; its folder is `runs_dir/name`."""
    search: Annotated[dict[str, Any], Field(min_length=1)]
    """Dotted config key to its `Space`."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Dotted config key to the value that it has in all trials."""
    samples: Positive = 1
    """Draws of the keys without a grid, for every point of the grid."""
    metric: str = "policy.gold"
    """The measure that ranks the trials: `policy.X`, `sft.X` or the paired `policy_minus_sft.X` of evaluation.json."""
    mode: Literal["max", "min"] = "max"
    concurrent: Positive = 1
    """Trials at a time; each asks for the config's `resources`."""

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            raise ValueError(f"did you mean {close[0]!r}?" if close else f"choose one of {names(METRICS)}")
        return name


@dataclass(frozen=True)
class Trial:
    """One combination of the swept keys' values."""

    name: str
    values: dict[str, Value]
    config: Config


@dataclass(frozen=True)
class Sweep:
    """A sweep, as its file and the command line describe it."""

    settings: SweepConfig
    search: dict[str, Space]
    tree: dict[str, Any]
    """The config that all trials share, before the swept keys are set."""
    changes: dict[str, Any]
    """The keys that `tree` changes in the config's file, with their values; without the split that sweeps use."""
    source: Path
    config_file: Path
    base: Config

    @property
    def shared(self) -> tuple[str, ...]:
        """The stages that no swept key goes into, in order: they run once."""
        touched = {stage for key in self.search for stage in stages_from(key)}
        return tuple(stage.name for stage in stages_of(self.base) if stage.name not in touched)

    def with_lengths(self, chosen: Config) -> Sweep:
        """The sweep with the lengths of `chosen`, which is its base with those that its config does not give."""
        tree = copy.deepcopy(self.tree)
        for key in self.base.data.to_choose:
            set_key(tree, f"data.{key}", getattr(chosen.data, key), str(self.source))
        return replace(self, tree=tree, base=parse_config(tree, f"{self.source}: {self.config_file}"))

    def trials(self, points: Iterable[Mapping[str, Value]], folder: str | Path) -> list[Trial]:
        """The trials at `points` (dotted key to value), each once, as runs in `folder` (an absolute path or a URI).

        Raises:
            UserError: a value that the config does not take, or two trials of one name.
        """
        found: dict[str, Trial] = {}
        for point in points:
            tree = copy.deepcopy(self.tree)
            for key, value in point.items():
                set_key(tree, key, value, f"{self.source}: search")
            config = parse_config(tree | {"name": BASE, "runs_dir": str(folder)}, f"{self.source}: search")
            values = {key: _value(config, key) for key in point}  # as the config reads them: 1e-4 is a number
            name = trial_name(values)
            if name in found and found[name].values != values:
                raise UserError(f"{self.source}: search: {found[name].values} and {values} would both be named {name}")
            found[name] = Trial(name, values, config.model_copy(update={"name": name}))
        return list(found.values())

    def command(self, trial: Trial) -> str:
        """The command line that runs the pipeline as `trial` did, evaluated on the test split."""
        words = {"name": f"{self.settings.name}-best"} | self.changes | trial.values
        file = os.path.relpath(self.config_file)
        settings = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in words.items()]
        return shlex.join(["rayrlhf", "run", file if not file.startswith("..") else str(self.config_file), *settings])


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file and the config that it names.

    An override whose key is one of the sweep file's (`samples=8`, `name=other`) changes the sweep; any other one the
    config. The trials are evaluated on the dev split unless `fixed` or an override says otherwise.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, a key that cannot be swept.
    """
    path = Path(path)
    own = read_yaml(path, "sweep file; the examples are in configs/sweeps/")
    changes: dict[str, Any] = {}
    for override in overrides:
        of_sweep = override.partition("=")[0].strip() in SweepConfig.model_fields
        key, value = parse_override(override, SweepConfig if of_sweep else Config)
        (own if of_sweep else changes)[key] = value
    settings = parse_section(SweepConfig, own, str(path))
    changes = settings.fixed | changes
    search = {key: parse_section(Space, space, f"{path}: search: {key}") for key, space in settings.search.items()}

    config_file = path.parent / settings.config
    tree = read_yaml(config_file, f"config file; {path} names it in `config`")
    for key, value in ({"evaluate.split": "dev"} | changes).items():
        set_key(tree, key, value, str(path))
    base = parse_config(tree, f"{path}: {config_file}")
    for key in search:
        if key in _DIFFERENT_BY_TRIAL or key in changes:
            why = "every trial has its own" if key in _DIFFERENT_BY_TRIAL else "it is fixed for all trials"
            raise UserError(f"{path}: search: {key!r} cannot be swept: {why}")
    if base.evaluate.prompts is not None:
        raise UserError(f"{path}: evaluate.prompts is set; a sweep compares trials on a split of the data")
    if base.rounds is not None:
        raise UserError(f"{path}: rounds is set; a trial is one run of the stages, so set rounds=null")
    if base.environment and settings.metric.partition(".")[2].startswith(("gold", "rouge")):
        raise UserError(
            f"{path}: metric {settings.metric!r} is not measured in a run with an environment; take policy.reward"
        )
    changes.pop("evaluate.split", None)
    return Sweep(settings, search, tree, changes, path, config_file, base)


def trial_name(values: Mapping[str, Value]) -> str:
    """`lr-0.0003_coefficient-0.05`: each key, cut as short as it stays distinct, with its value."""
    labels = short_names(values)
    words = (f"{labels[key]}-{_word(value)}" for key, value in values.items())
    return "_".join(words)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The fewest last parts of each dotted key that tell it from the others.

    >>> short_names(["sft.optimizer.lr", "rl.optimizer.lr", "rl.lam"])
    {'sft.optimizer.lr': 'sft.optimizer.lr', 'rl.optimizer.lr': 'rl.optimizer.lr', 'rl.lam': 'lam'}
    """
    parts = {key: key.split(".") for key in keys}

    def ending(key: str, length: int) -> str:
        return ".".join(parts[key][-length:])

    short = {}
    for key in parts:
        lengths = range(1, len(parts[key]) + 1)
        unique = (n for n in lengths if sum(ending(other, n) == ending(key, n) for other in parts) == 1)
        short[key] = ending(key, next(unique))
    return short


def _value(config: Config, key: str) -> Value:
    node: Any = dump_config(config)
    for part in key.split("."):
        node = node[part]
    return node


def _word(value: Value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"[^A-Za-z0-9.-]+", "-", text.replace("+", ""))
    return text if isinstance(value, int | float) else text.strip("-.")
