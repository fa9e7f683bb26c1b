"""`rayrlhf init`: a folder with a commented config for a run on the user's own data."""

from __future__ import annotations

import re
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.files import replacing

TEMPLATES = Path(__file__).parent / "assets" / "starter"
FILES = ("config.yaml", "README.md")


def write_starter(directory: Path) -> list[Path]:
    """Write the files of a new run into `directory`, which is made if it is not there; returns their paths.

    The run is named after the directory; `NAME` in the templates is replaced by that name.

    Raises:
        UserError: one of the files exists already, or `directory` is a file. Nothing is written then.
    """
    paths = [directory / name for name in FILES]
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; give a folder")
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already and is left as it is; give another folder")
    name = run_name(directory)
    for path in paths:
        text = (TEMPLATES / path.name).read_text(encoding="utf-8").replace("NAME", name)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def run_name(directory: Path) -> str:
    """A run's name from the folder's: characters that a name cannot have become dashes.

    >>> run_name(Path("/data/my posts"))
    'my-posts'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("._-") or "mine"
