"""Show what `configs/showcase.yaml` has taught: four openings, with the answers of the SFT model and of the policy.

    python scripts/showcase_answers.py configs/showcase.yaml               # arguments as those of `rayrlhf run`
    python scripts/showcase_answers.py configs/showcase.yaml --markdown    # the table of docs/showcase.md

The four are not the best ones. The test prompts are ordered by their gain of gold (policy minus SFT), and cut into four
quarters; shown is the prompt in the middle of each.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from jobs.console import PlainConsole
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.runs.folder import RunFolder
from rayrlhf.terminal import say

SHOWN = 4
HEADINGS = ("opening", "before (SFT)", "after (policy)", "gold")


def picked(rows: Sequence[Mapping[str, Any]], count: int = SHOWN) -> list[Mapping[str, Any]]:
    """The rows in the middle of each of `count` equal parts, from the least gain of gold to the largest.

    Args:
        rows: of samples.parquet, at least `count`; equal gains stand in the order of their ids.
        count: parts.
    """
    ordered = sorted(rows, key=lambda row: (row["gold_policy"] - row["gold_sft"], row["id"]))
    return [ordered[(2 * part + 1) * len(ordered) // (2 * count)] for part in range(count)]


def cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What the table shows of a prompt, each text in one line."""
    texts = (" ".join(row[name].split()) for name in ("post", "sft", "policy"))
    return *texts, f"{row['gold_sft']:+.2f} → {row['gold_policy']:+.2f}"  # type: ignore[return-value]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for the documents."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="such as name=OTHER, if the run had them")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    run = RunFolder(os.path.abspath(os.path.join(config.runs_dir, config.name)))
    if not run.samples.is_file():
        raise SystemExit(f"error: {run.samples}: no such file; finish the run with `rayrlhf run {arguments.config}`")
    rows = pq.read_table(run.samples).to_pylist()
    if len(rows) < SHOWN:
        raise SystemExit(f"error: {run.samples} has {len(rows)} test prompts; at least {SHOWN} are needed")
    shown = picked(rows)
    if arguments.markdown:
        say(markdown(shown))
        return
    title = f"{SHOWN} of {len(rows)} test prompts: the middle ones of four quarters, ordered by their gain of gold"
    table = Table(*HEADINGS, title=title, title_justify="left", show_lines=True)
    for row in shown:
        table.add_row(*cells(row))
    PlainConsole().print(table)


if __name__ == "__main__":
    main()
