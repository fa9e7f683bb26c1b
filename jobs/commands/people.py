"""`rayrlhf label`: the page on which people rank answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.options import Folder, run_guarded

app = typer.Typer()


@app.command("label")
def label_command(
    run_folder: Folder,
    host: Annotated[str, typer.Option(help="Where to listen; other machines need --public-url, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8100,
    public_url: Annotated[
        str | None, typer.Option(help="Where browsers find the page, for example behind a proxy.")
    ] = None,
    labellers: Annotated[str | None, typer.Option(help="Names, each with a link of its own: ann,bob.")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Labellers for each item. Without it: what collect asks for, or 1.")
    ] = None,
    mode: Annotated[str, typer.Option(help="rank: all answers at once; pairs: two at a time.")] = "rank",
    ratings: Annotated[bool, typer.Option("--ratings", help="Also ask for a rating of each answer, 1 to 7.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the order of answers and items; fixed at the first start. [default: 0]")
    ] = None,
    repeats: Annotated[float, typer.Option(help="Share of items that a labeller sees a second time.")] = 0.05,
    gold: Annotated[
        Path | None, typer.Option(help="JSONL of rankings that are known; everybody gets these items.")
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="Markdown for labellers. Without it: instructions.md of the run, or ours.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write rankings, pairs and judgements into this folder, and exit.")
    ] = None,
    imported: Annotated[
        Path | None, typer.Option("--import", help="Add the rankings of a JSONL file, and exit.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Delete all that this labeller said, and exit.")] = None,
) -> None:
    """Open a page on which people rank the run's answers. Needs no Ray; Ctrl-C ends it, judgements are kept."""

    def action() -> None:
        from jobs.label import Serving, label

        serving = Serving(host, port, public_url, labellers, overlap, mode, ratings, seed, repeats, gold, instructions)
        label(run_folder, serving, export, imported, forget)

    run_guarded(action)
