"""Code that the config names as `FILE.py:NAME` or `MODULE:NAME`: read by the driver, run where it is needed.

Of a file the text travels, not the path, so that nodes need no copy of it. It may import what is installed there. A
module has to be installed on every node.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

from rayrlhf.errors import UserError, one_line


class Plugin(NamedTuple):
    """A name in a Python file or module."""

    path: str
    """Of the file, or the dotted name of the module."""
    name: str
    source: str | None
    """The text of the file; None of a module."""

    @classmethod
    def read(cls, where: str, key: str) -> Plugin:
        """Read what the config's `key` names.

        Args:
            where: `FILE.py:NAME`, whose relative path starts where the command does, or `MODULE:NAME`.
            key: for the error.

        Raises:
            UserError: there is no such file.
        """
        path, _, name = where.rpartition(":")
        if not path.endswith(".py"):
            return cls(path, name, None)
        try:
            return cls(path, name, Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {path} cannot be read ({one_line(error)})") from None

    def load(self) -> Any:
        """Run the file or import the module, and return what has the name.

        Raises:
            UserError: the code raises, or has no such name.
        """
        found = getattr(self._imported() if self.source is None else self._run(self.source), self.name, None)
        if found is None:
            raise UserError(f"{self.path} has no {self.name!r}")
        return found

    def _imported(self) -> types.ModuleType:
        try:
            return importlib.import_module(self.path)
        except Exception as error:
            raise UserError(f"{self.path}: {type(error).__name__}: {one_line(error)}") from error

    def _run(self, source: str) -> types.ModuleType:
        module = types.ModuleType(f"rayrlhf_plugin_{Path(self.path).stem}")
        module.__file__ = self.path
        sys.modules[module.__name__] = module  # dataclasses look their module up
        try:
            exec(compile(source, self.path, "exec"), module.__dict__)
        except Exception as error:
            line = getattr(error.__traceback__.tb_next, "tb_lineno", None) if error.__traceback__ else None
            place = f"{self.path} line {line}" if line else self.path
            raise UserError(f"{place}: {type(error).__name__}: {one_line(error)}") from error
        return module
