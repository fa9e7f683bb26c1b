"""A whole config with the origin of every value: `rayrlhf config`.

    >>> print(annotated("mine.yaml", ["rl.steps=5"]))  # doctest: +SKIP
    name: mine  # mine.yaml:1
    seed: 0  # default
    rl:
      steps: 5  # command line
    ...

The text is itself a config: `load_config` reads it and gives the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, load_config, parse_override
from rayrlhf.config_resources import ResourcesConfig
from rayrlhf.machine import this_machine
from rayrlhf.yaml_text import write_yaml_text

Key = tuple[str, ...]
"""The parts of a dotted key. Labels have dots inside a part."""
_HERE = "auto, for this machine"


def annotated(path: str | Path, overrides: list[str]) -> str:
    """The validated config as YAML, defaults included, with a comment behind each value that says where it is from.

    Raises:
        UserError: as `load_config`.
    """
    config = load_config(path, overrides)
    found = origins(path, overrides)
    shared = config.resources.shared_among([this_machine()])
    tree = dump_config(config.model_copy(update={"resources": shared}))
    tree["data"].update(dict.fromkeys(config.data.to_choose, "auto"))
    tree["resources"]["generators"].update(dict.fromkeys(shared.generators.to_choose, "auto"))
    return "\n".join(_lines(tree, {**dict.fromkeys(_chosen(config, shared), _HERE), **found})) + "\n"


def _chosen(config: Config, shared: ResourcesConfig) -> Iterator[Key]:
    """The keys of `resources` that were chosen for this machine."""
    for role in shared.ROLES:
        before, now = getattr(config.resources, role), getattr(shared, role)
        yield from (("resources", role, name) for name in now.model_fields_set - before.model_fields_set)


def origins(path: str | Path, overrides: list[str]) -> dict[Key, str]:
    """Where each key was set: `FILE:LINE`, counted from 1, or `command line`. Keys with their default are absent."""
    found: dict[Key, str] = {}
    _add_node(found, (), yaml.compose(Path(path).read_text(encoding="utf-8")), str(path))
    for override in overrides:
        dotted, value = parse_override(override)
        key = tuple(dotted.split("."))
        # The override replaces what the file has under this key, a whole section, too.
        found = {other: origin for other, origin in found.items() if other[: len(key)] != key}
        _add_value(found, key, value)
    return found


def _add_node(found: dict[Key, str], key: Key, node: yaml.Node | None, file: str) -> None:
    """Note the lines of a YAML node and of all below it."""
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        if name.value == "<<":  # a merge: its keys are this mapping's own, which take precedence
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                inherited: dict[Key, str] = {}
                _add_node(inherited, key, merged, file)
                found.update({each: line for each, line in inherited.items() if each not in found})
            continue
        found[(*key, name.value)] = f"{file}:{name.start_mark.line + 1}"
        _add_node(found, (*key, name.value), value, file)


def _add_value(found: dict[Key, str], key: Key, value: Any) -> None:
    found[key] = "command line"
    if isinstance(value, dict):
        for name, inner in value.items():
            _add_value(found, (*key, str(name)), inner)


def _lines(tree: Mapping[str, Any], origin: Mapping[Key, str], key: Key = ()) -> list[str]:
    lines = []
    for name, value in tree.items():
        own, indent = (*key, name), "  " * len(key)
        if isinstance(value, dict) and value:
            lines += [f"{indent}{_inline(name)}:", *_lines(value, origin, own)]
        else:
            lines.append(f"{indent}{_inline(name)}: {_inline(value)}  # {origin.get(own, 'default')}")
    return lines


def _inline(value: Any) -> str:
    """A value as YAML in one line."""
    text = write_yaml_text(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
