"""From a YAML file to a validated config. Every mistake is a one-line `UserError` that names the key and the remedy."""

from __future__ import annotations

import difflib
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rayrlhf.config import Config
from rayrlhf.errors import UserError
from rayrlhf.sections import Section
from rayrlhf.wording import shown
from rayrlhf.yaml_text import read_yaml_text

AnySection = TypeVar("AnySection", bound=Section)

RENAMED = {"ppo": "rl"}
"""Keys of earlier versions."""
_TRUNCATES = (
    "rl learns from log-probs of the whole softmax; a truncated one leaves out other tokens after every update, so "
    "that the ratio of new to old policy is undefined; use rl.temperature, or {key} in collect and evaluate"
)
_PENALISES = (
    "it makes a token's log-prob depend on how often it was sampled before, which no model here computes; "
    "take a reward that counts repetitions"
)
_STOPS = (
    "a text may be several tokens, whose last one is not the policy's own choice; "
    "name single tokens in data.stop_tokens"
)
_COUNTS = "samples of a prompt are rl.samples_per_prompt, collect.answers_per_prompt and evaluate.best_of"
ELSEWHERE = {
    **{key: _TRUNCATES.format(key=key) for key in ("top_p", "top_k", "min_p")},
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _PENALISES),
    "logit_bias": "it samples from another distribution than the policy's; take a reward for or against these tokens",
    **dict.fromkeys(("stop", "stop_strings", "stop_token_ids"), _STOPS),
    **dict.fromkeys(("n", "best_of", "num_return_sequences"), _COUNTS),
    **dict.fromkeys(("min_tokens", "min_new_tokens"), "for all stages it is data.min_response_tokens"),
    **dict.fromkeys(("max_tokens", "max_new_tokens"), "for all stages it is data.max_response_tokens"),
}
"""Names by which other programs know options of sampling, and what there is in their place. They are looked at where a
section has no key of the name."""
_SHOWN = 100
"""Characters of a wrong value that an error shows."""
_LINE = 300
"""Characters of all that is wrong with a file; more are not read."""
CHOOSING = ("algorithm", "loss", "kind")
"""Keys that say which of several sections is meant, as `rl.algorithm` does."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run's YAML file and apply overrides such as ``rl.steps=3``.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, impossible value.
    """
    tree = read_yaml(path, "config file; the examples are in configs/")
    for override in overrides or []:
        set_key(tree, *parse_override(override), f"override {shown(override)}")
    return parse_config(tree, str(path))


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        path: the file.
        what: names it in the error "no such ...".

    Raises:
        UserError: missing or malformed file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such {what}")
    try:
        tree = read_yaml_text(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of config keys, found {type(tree).__name__}")
    return tree


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a plain mapping; `where` names its origin in error messages."""
    return parse_section(Config, tree, where)


def parse_section(section: type[AnySection], tree: Any, where: str) -> AnySection:
    """Validate what YAML holds as a `section`; `where` names its origin in error messages."""
    try:
        return section.model_validate(_numbers(tree, section), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_some([_explain(each, section) for each in error.errors()])}") from None


def dump_config(config: Config) -> dict[str, Any]:
    """The complete config, defaults filled in, as a mapping that YAML and JSON can hold."""
    return config.model_dump(mode="json")


def parse_override(override: str, root: type[BaseModel] = Config) -> tuple[str, Any]:
    """The dotted key and the value of ``key.sub=value``, whose key is one of `root`.

    The value is YAML. A key that holds text takes it as it stands: `name=2024-11-05` is no date there, and ` #` begins
    no comment. Quotes around the whole text are taken off.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise UserError(f"override {shown(override)}: write key.sub=value, for example rl.steps=3")
    kinds = _text_kinds(key, root)
    if kinds and not text.lstrip().startswith(("'", '"')):
        return key, None if type(None) in kinds and text.strip() in ("null", "~", "") else text.strip()
    try:
        return key, read_yaml_text(text)
    except ValueError as error:
        raise UserError(f"override {shown(override)}: the value is not valid YAML ({error})") from None


def _text_kinds(key: str, root: type[BaseModel]) -> set[Any]:
    """`{str}`, or `{str, NoneType}`, if the key holds a text in every section that may have it; otherwise nothing."""
    *parents, last = key.split(".")
    sections = [root]
    for part in parents:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [inner for field in fields for inner in _sections(field.annotation)]
    annotations = [section.model_fields[last].annotation for section in sections if last in section.model_fields]
    kinds = {kind for each in annotations for kind in (get_args(each) if isinstance(each, UnionType) else (each,))}
    return kinds if str in kinds and kinds <= {str, type(None)} else set()


def set_key(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key, making the sections on the way; `where` names its origin in error messages."""
    *sections, last = key.split(".")
    node = tree
    for part in sections:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"{where}: {part!r} is a value, not a section")
        node = child
    node[last] = value


def _numbers(tree: Any, section: type[BaseModel] | None) -> Any:
    """A whole number where a float is wanted becomes one, and lists become tuples."""
    if not isinstance(tree, dict) or section is None:
        return tree
    out: dict[str, Any] = {}
    for key, value in tree.items():
        field = _keys_of(section).get(str(key))
        out[key] = _typed(value, field.annotation) if field else value
    return out


def _typed(value: Any, annotation: Any) -> Any:
    """See `_numbers`, of the value of one key, or of one element of its list."""
    wanted = str(annotation)
    if isinstance(value, dict):
        return _numbers(value, _nested_section(annotation, next((value[k] for k in CHOOSING if k in value), None)))
    if isinstance(value, list) and "tuple" in wanted:
        return tuple(_typed(each, annotation) for each in value)
    number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if number and "float" in wanted and "str" not in wanted else value


def _nested_section(annotation: Any, tag: Any = None) -> type[BaseModel] | None:
    """The section that a field or its list holds; of several ones, as `rl` may hold, the one of this tag, else the
    first."""
    sections = list(_sections(annotation))
    named = [each for each in sections if tag and tag == _tag_of(each)]
    return next(iter(named or sections), None)


def _keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in a file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """All sections in a type such as `tuple[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    parts = (getattr(annotation, "__origin__", None), *getattr(annotation, "__args__", ()))
    for part in parts:
        if part is not None:
            yield from _sections(part)


def _tag_of(section: type[BaseModel]) -> Any:
    """What the choosing key of this section has to be; None if it has none."""
    return next((section.model_fields[name].default for name in CHOOSING if name in section.model_fields), None)


def _explain(error: Any, root: type[BaseModel]) -> str:
    key, section = _key_of(error["loc"], root)
    if error["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"key {key!r} is {RENAMED[key]!r} now"
        if error["loc"][-1] in ELSEWHERE:
            return f"there is no key {key!r}: {ELSEWHERE[error['loc'][-1]]}"
        known = list(_keys_of(section)) if section else []
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        others = textwrap.shorten(", ".join(known), _LINE // 2, placeholder=" …")
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {others}"
        return f"unknown key {_short(repr(key))}; {hint}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    if error["type"] == "union_tag_invalid":
        expected = error["ctx"]["expected_tags"].replace("'", "")
        choosing = error["ctx"]["discriminator"].strip("'_()")  # pydantic's name for it, such as _algorithm()
        return f"key '{key}.{choosing}': {error['ctx']['tag']!r} is none of {expected}"
    message = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"key {key!r}: {message[0].lower()}{message[1:]} (got {_short(repr(error['input']))})" if key else message


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _some(mistakes: Sequence[str]) -> str:
    """The first mistakes, as many as fit into a line, and how many there are besides."""
    shown = next((n for n in (3, 2) if len("; ".join(mistakes[:n])) <= _LINE), 1)
    more = len(mistakes[shown:])
    return "; ".join(mistakes[:shown]) + (f"; and {more} more" if more else "")


def _key_of(places: Sequence[Any], root: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key that a validation error is about, and the section that has or lacks its last part."""
    parts: list[str] = []
    inside: type[BaseModel] | None = root
    section, annotation = inside, None
    for place, following in itertools.zip_longest(places, places[1:]):
        if isinstance(place, int):  # of a list
            parts[-1] += f"[{place}]"
            inside = _nested_section(annotation, following)
            continue
        if parts and inside is not None and place == _tag_of(inside):
            continue  # pydantic's name for the member of a union, which is no key
        parts.append(str(place))
        section = inside
        field = _keys_of(section).get(str(place)) if section else None
        annotation = field.annotation if field else None
        inside = _nested_section(annotation, following)
    return ".".join(parts), section
