"""YAML as the files of this project have it: the scalars of YAML 1.2, no key twice, nothing larger than its text.

PyYAML reads YAML 1.1, in which `1:30` is 90, `012` is 10, `yes` is true and `3e-6` is text. It takes the last one of
two equal keys, and a dozen lines of nested aliases stand for more values than fit into memory.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from rayrlhf.errors import one_line

MAX_DEPTH = 50
"""Mappings and lists inside each other."""
MAX_NODES = 100_000
"""Values after every alias is replaced by what it stands for."""
MAX_DIGITS = 300
"""Digits of a whole number: more are a mistake, and Python refuses to print some thousands."""


def read_yaml_text(text: str) -> Any:
    """The value that YAML text stands for.

    >>> read_yaml_text("{lr: 3e-6, when: 1:30, on: true}")
    {'lr': 3e-06, 'when': '1:30', 'on': True}

    Raises:
        ValueError: it is no YAML, a key stands twice in a mapping or is no text, it is nested too deeply, or its
            aliases stand for too much. The message is one line, with the line of the text where that is known.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:  # lists of lists, which PyYAML reads by recursion
        raise ValueError(_TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError((f"line {mark.line + 1}: " if mark else "") + str(error.problem or error.context)) from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None


def write_yaml_text(value: Any, **options: Any) -> str:
    """Text that `read_yaml_text` reads as the same value. `options` are those of `yaml.dump`."""
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **options))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as PyYAML has it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", _MERGE):
                raise yaml.constructor.ConstructorError(None, None, f"key {_shown(key)} is no text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {_shown(key)} stands twice in one mapping; keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
        return int(text, 8 if "o" in text else 16 if "x" in text else 10)

    def real_number(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        return float(re.sub(r"\.(?=inf|nan)", "", text))

    def boolean(self, node: yaml.ScalarNode) -> bool:
        return bool(self.construct_scalar(node).lower() == "true")


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that would be read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def text(self, value: str) -> yaml.ScalarNode:
        # PyYAML writes Unicode's line breaks as they are, and reads them as spaces, unless double quotes are asked for.
        style = '"' if re.search("[\x85\u2028\u2029]", value) else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style)


_TOO_DEEP = f"more than {MAX_DEPTH} mappings and lists inside each other"
_MERGE = "tag:yaml.org,2002:merge"
# YAML 1.2.2, section 10.3.2, "Tag Resolution" of the core schema. `<<` is not part of it, but widely used.
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Dumper.add_representer(str, _Dumper.text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real_number)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.boolean)


def _shown(key: yaml.Node) -> str:
    text = key.value if isinstance(key, yaml.ScalarNode) else "[...]"
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _count(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """How many values a node stands for, aliases included, by the ids of those that are known; 0 while it is counted.

    Raises:
        ValueError: it contains itself, or there are too many.
    """
    if depth == MAX_DEPTH and not isinstance(node, yaml.ScalarNode):
        raise ValueError(_TOO_DEEP)
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an anchor contains itself")
        return known[id(node)]
    known[id(node)] = 0
    inner = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
    count = 1 + sum(_count(part, known, depth + 1) for part in parts)
    if count > MAX_NODES:
        raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
    known[id(node)] = count
    return count
