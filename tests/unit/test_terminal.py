"""Texts of others reach the terminal as texts: no escape sequence, no turned direction, no markup of rich."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from jobs.cli import app
from jobs.console import PlainConsole, warn
from jobs.data import show_data
from jobs.guard import guarded
from rayrlhf.errors import UserError
from rayrlhf.reports.agreement import Grid
from rayrlhf.reports.progress import sample_panel
from rayrlhf.terminal import LogFormatter, complain, printable, say

ROOT = Path(__file__).parents[2]
TITLE = "\x1b]0;owned\x07"
"""Sets the title of the terminal's window."""
HOSTILE = f"{TITLE}\x1b[2J\x9b31mred\u202egnp.exe [bold]b[/] [/] [red] :skull:"
SEEN = "\ufffd]0;owned\ufffd\ufffd[2J\ufffd31mred\ufffdgnp.exe [bold]b[/] [/] [red] :skull:"
TURNING = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
"""Classes of characters of the Unicode bidirectional algorithm that turn what follows."""


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal would obey, by the tables of Unicode."""
    return [
        each
        for each in text
        if (unicodedata.category(each) in ("Cc", "Cs") and each not in "\t\n")
        or unicodedata.bidirectional(each) in TURNING
    ]


def test_of_all_characters_those_are_replaced_that_unicode_calls_controls() -> None:
    """Those of the planes that have any."""
    places = (*range(0x3000), *range(0xD700, 0xE100), *range(0xFE00, 0x10100), *range(0xE0000, 0xE0200))
    every = "".join(map(chr, places))
    shown = printable(every)
    replaced = [one for one, other in zip(every, shown, strict=True) if one != other]
    assert replaced == obeyed(every) and len(replaced) == 65 - 2 + 9 + 2048


def test_lines_of_every_system_end_with_a_feed() -> None:
    assert printable("a\r\nb\tc\n") == "a\nb\tc\n"
    assert printable("done 10 %\rdone 20 %") == "done 10 %\ufffddone 20 %"


def test_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    say(HOSTILE, end="")
    complain(HOSTILE)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{SEEN}\n{SEEN}", f"{SEEN}\n")


def a_table(text: str) -> Table:
    table = Table("head " + text, title=text, caption=text)
    table.add_row(text)
    return table


RENDERED: dict[str, Callable[[str], RenderableType]] = {
    "text": str,
    "rich text": lambda text: Text("from ", style="dim").append(text, "bold"),
    "table": a_table,
    "panel": lambda text: Panel(text, title=Text(text)),
    "sample": lambda text: sample_panel(text, text, text, title=text),
    "grid": lambda text: Grid(text, ("name", text), (("a row", text),)).rich(),
}


@pytest.mark.parametrize("name", RENDERED)
def test_everything_that_the_console_shows(name: str) -> None:
    """Whole, and between borders that stand where they would without such characters."""
    shown = {}
    for kind, text in (("hostile", HOSTILE), ("harmless", SEEN)):
        out = io.StringIO()
        PlainConsole(file=out, width=400).print(RENDERED[name](text))
        shown[kind] = out.getvalue()
    assert shown["hostile"] == shown["harmless"]
    assert SEEN in shown["hostile"] and not obeyed(shown["hostile"])


def test_the_console_lets_nothing_through_if_rich_makes_texts_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rich of another version may have no such place for `printable`."""
    monkeypatch.setattr("rich.text.strip_control_codes", str)
    out = io.StringIO()
    for make in RENDERED.values():
        PlainConsole(file=out, width=400).print(make(HOSTILE))
    assert out.getvalue().count("\ufffd[2J") > 10 and not obeyed(out.getvalue())


def test_a_terminal_gets_the_sequences_of_the_bar_and_no_others() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=200, force_terminal=True, color_system=None)
    with Live(Text(HOSTILE), console=console, refresh_per_second=100) as live, console.status(Text(HOSTILE)):
        live.update(a_table(HOSTILE))
        console.print(HOSTILE)
        console.rule(Text(HOSTILE))
        warn(console, HOSTILE)
    moves = re.compile(r"\x1b\[\??[0-9;]*[A-GKJhl]|\r")  # the cursor, and lines that are drawn again
    sent = out.getvalue()
    assert moves.search(sent)
    assert not obeyed(moves.sub("", sent)) and TITLE not in sent and "\x1b[2J" not in sent


@pytest.mark.parametrize("failure", [UserError(HOSTILE), FloatingPointError(HOSTILE), OSError(HOSTILE)])
def test_an_error_of_a_command(failure: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """It may quote a file, a server or a model."""

    def action() -> None:
        raise failure

    assert guarded(action) in (1, 2)
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err) and SEEN in shown.err


def test_a_log_record() -> None:
    record = logging.LogRecord("store", logging.WARNING, "", 0, "%s", (HOSTILE,), None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == f"WARNING {SEEN}"


def test_commands_on_names_with_markup_and_escape_sequences(tmp_path: Path) -> None:
    folder = tmp_path / "[red]\x1b[31m[]"
    folder.mkdir()
    for arguments in (["runs", str(folder)], ["status", str(folder)], ["config", f"{folder}/[/].yaml"]):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
        assert not obeyed(shown.output) and "[red]\ufffd[31m[]" in shown.output.replace("\n", "")


def test_a_data_file_that_would_write_over_the_screen(tmp_path: Path) -> None:
    file = tmp_path / "[red] :skull:.jsonl"
    rows = [{"prompt": f"{HOSTILE} {number}", "response": HOSTILE} for number in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.StringIO()
    show_data(str(file), [], None, PlainConsole(file=out, width=200))
    assert out.getvalue().count("\ufffd[2J") > 1 and not obeyed(out.getvalue())


def test_no_other_console_is_made_and_no_markup_is_read() -> None:
    """That nothing calls `print` but `say` and `complain`, the linter holds (T20)."""
    for package in ("rayrlhf", "actors", "jobs"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(?<!\w)Console\(|from_markup|rich\.markup|markup=True|secho", text), file
