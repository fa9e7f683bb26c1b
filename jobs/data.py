"""`rayrlhf data`: what a run would use of its data, or what a file holds. Starts nothing and writes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.config_data import DatasetConfig
from rayrlhf.config_file import load_config, parse_config, parse_override, parse_section, set_key
from rayrlhf.data.formats import FORMATS, LOOKED_AT, recognise, renamed
from rayrlhf.data.lengths import choose_lengths
from rayrlhf.data.loading import load_source
from rayrlhf.data.run_data import KINDS, RunData
from rayrlhf.models.loading import context_length, load_tokenizer, resolve_model
from rayrlhf.reports.data_usage import example_panels, shared_prompts, usage_table, usages
from rayrlhf.sections import Section

SOURCE_KEYS = frozenset(DatasetConfig.model_fields)


def show_data(source: str, overrides: Sequence[str], model: str | None, console: Console) -> None:
    """Print a table of records by use, what is dropped, cut or unused, and an example of each kind of records.

    Args:
        source: a run's YAML file; or anything that `data.demonstrations.path` may be.
        overrides: changes to the config; with a file alone, also to its source: `columns={prompt: question}`.
        model: the model whose tokenizer counts, in place of the config's; of a file alone, of the embedded one.
        console: where to print.

    Raises:
        UserError: the config, a source or a row cannot be read.
    """
    changes = [*overrides, *([f"model.path={model}"] if model else [])]
    if source.endswith((".yaml", ".yml")):
        config = load_config(source, changes)
        kinds = [kind for kind in KINDS if getattr(config.data, kind)]
    else:
        own = [change for change in changes if change.partition("=")[0].split(".")[0].strip() in SOURCE_KEYS]
        section: dict[str, Any] = {"path": source}
        _change(section, own, DatasetConfig)
        kinds = [_kind_of(parse_section(DatasetConfig, section, source))]
        tree: dict[str, Any] = {"name": "data", "data": {kinds[0]: section}}
        if kinds[0] == "comparisons":  # labelled answers are refused where a stage needs pairs
            tree["stages"] = ["sft"]
        _change(tree, [change for change in changes if change not in own], Config)
        config = parse_config(tree, source)
    path = resolve_model(config.model.path)
    tokenizer = load_tokenizer(path, config.model.revision)
    config, lengths = choose_lengths(config, tokenizer, context_length(path))
    if lengths:
        console.print(lengths, soft_wrap=True)
    data = RunData(config, tokenizer)
    data.read(kinds)
    found = usages(config, tokenizer, kinds)
    console.print(usage_table(config, found))
    for line in shared_prompts(found):
        console.print(line, soft_wrap=True)
    for panel in example_panels(tokenizer, found):
        console.print(panel)


def _change(tree: dict[str, Any], changes: Sequence[str], root: type[Section]) -> None:
    for change in changes:
        set_key(tree, *parse_override(change, root), f"override {change!r}")


def _kind_of(source: DatasetConfig) -> str:
    """What a file alone is for, by its format."""
    first = list(itertools.islice(load_source(source).train, LOOKED_AT))
    name = source.format or recognise(
        source.path,
        [renamed(row, source.columns) for row in first],
        ("comparison", "labelled", "demonstration", "prompt"),
    )
    if name not in FORMATS:
        return "demonstrations"  # where the format is refused
    found = FORMATS[name]
    if name != "prompts" and (found.labelled or found.comparison):
        return "comparisons"
    return "demonstrations" if found.demonstration else "prompts"
