"""From a YAML file to a validated config. Every mistake is a one-line `UserError` that names the key and the remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rayrlhf.config import Config, Section
from rayrlhf.errors import UserError

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run's YAML file and apply overrides such as ``ppo.steps=3``.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, impossible value.
    """
    tree = read_yaml(path, "config file; the examples are in configs/")
    for override in overrides or []:
        set_key(tree, *parse_override(override), f"override {override!r}")
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
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
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
        raise UserError(f"{where}: " + "; ".join(_explain(e, section) for e in error.errors()[:3])) from None


def dump_config(config: Config) -> dict[str, Any]:
    """The complete config, defaults filled in, as a mapping that YAML and JSON can hold."""
    return config.model_dump(mode="json")


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of ``key.sub=value``."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"override {override!r}: write key.sub=value, for example ppo.steps=3")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


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
    """Accept what YAML 1.1 misreads: `3e-6` is text and `1` an int where a float is wanted; lists become tuples."""
    if not isinstance(tree, dict) or section is None:
        return tree
    out: dict[str, Any] = {}
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        annotation = str(field.annotation) if field else ""
        nested = _nested_section(field.annotation) if field else None
        if nested is not None:
            value = _numbers(value, nested)
        elif "float" in annotation and isinstance(value, str) and "str" not in annotation:
            value = _as_float(value)
        elif "tuple" in annotation and isinstance(value, list):
            value = tuple(_as_float(v) for v in value)
        out[key] = value
    return out


def _as_float(value: Any) -> Any:
    """A number where there is one; what is not stays, for the validation to name it."""
    try:
        return float(value) if isinstance(value, int | str) and not isinstance(value, bool) else value
    except ValueError:
        return value


def _nested_section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(error: Any, root: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] | None = root
        for part in error["loc"][:-1]:
            field = section.model_fields.get(str(part)) if section else None
            section = _nested_section(field.annotation) if field else None
        known = list(section.model_fields) if section else []
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"key {key!r}: {message[0].lower()}{message[1:]} (got {error['input']!r})" if key else message
