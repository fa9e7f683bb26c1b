"""The frame of report.html: one file with its style, its script and its data, which asks nothing of any host.

The browser runs only what the page's policy names by its hash, so that markup in a prompt or an answer stays text. What
the script reads is JSON in an element of its own, in which `<` is written as `\\u003c`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rayrlhf.labelling import web

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
_THEME = Path(web.__file__).parent / "static" / "theme.css"
_STYLES = (_THEME, _STATIC / "uplot.min.css", _STATIC / "report.css")
_LICENCE = _STATIC / "uplot.LICENSE.txt"
"""Of the library, which has to be in every copy of it."""
_SCRIPTS = tuple(_STATIC / name for name in ("uplot.min.js", "charts.js", "samples.js", "tokens.js", "report.js"))


def document(template: str, data: Mapping[str, Any] | None = None, live: str = "", **context: Any) -> str:
    """A whole page.

    Args:
        template: a file of `templates/` that extends `frame.html`.
        data: what the script reads; None for a page without a script.
        live: the state that a page shows which asks its own server for news; empty for a file.
        **context: of the template; texts are escaped where they are put in.
    """
    style = "\n".join(_text(path) for path in _STYLES)
    script = "\n".join([f"/*! {_text(_LICENCE)}*/", *map(_text, _SCRIPTS)]) if data is not None else ""
    asked = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        f"connect-src {asked}; base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            policy=policy,
            style=Markup(style),
            script=Markup(script),
            data=None if data is None else Markup(as_json(data)),
            live=live,
            **context,
        )
    )


def as_json(data: Any) -> str:
    """JSON that no markup can end; numbers that are not finite are null."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def inline(figure: Figure) -> Markup:
    """The figure as a data URI. Inlined as SVG elements, two figures could have the same ids."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return Markup("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _source(content: str) -> str:
    """What a policy calls an inline style or script."""
    if not content:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
