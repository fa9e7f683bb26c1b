"""`rayrlhf status RUN`, `rayrlhf runs`, `rayrlhf rounds RUN`: what is going on, from the run folders and from Ray."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rayrlhf.errors import UserError
from rayrlhf.reports.measures import STEP_MEASURES
from rayrlhf.reports.overview import Overview, StageOverview, read_overview
from rayrlhf.reports.progress import duration, step_line
from rayrlhf.runs.folder import RunFolder, run_at, run_folders
from rayrlhf.runs.rounds import has_rounds, stopped

if TYPE_CHECKING:
    from jobs.live import Live


def show_status(path: str | Path, address: str | None, console: Console) -> None:
    """Print the state of the run in folder `path`, which may be a URI; with its actors, if its cluster can be found.

    Raises:
        UserError: no run folder, or the cluster at an `address` that was given does not know the run.
    """
    overview = read_overview(path)
    where = cluster_address(address, overview.holder)
    live: Live | str | None = None
    if where and (overview.holder or address):
        from jobs.live import read_live  # imports Ray, which takes seconds: only for a run that is under way

        try:
            live = read_live(where, overview.config)
        except UserError as error:
            if address:
                raise
            live = str(error)
    # Read again: to join a cluster takes seconds, in which the run went on.
    console.print(status_screen(read_overview(path), live, time.time()))


def cluster_address(given: str | None, holder: str | None) -> str | None:
    """Where the run's cluster is: at the address given, at RAY_ADDRESS, or where the run's process says it is.

    Args:
        given: the command line's `--address`.
        holder: what the run's lock says about the process that works on it.

    Returns:
        `host:port`, or None if nothing says where.
    """
    said = re.search(r"Ray at (\S+)", holder or "")
    return given or os.environ.get("RAY_ADDRESS") or (said.group(1) if said else None)


def scale_run(path: str | Path, address: str | None, generators: int | None, scorers: int | None) -> dict[str, int]:
    """Grow or shrink the pools of the run in folder `path`, which is under way; returns how many there are to be.

    Raises:
        UserError: nothing to change, a run that nobody works on, or what its coordinator refuses.
    """
    if generators is None and scorers is None:
        raise UserError("scale: say how many, with --generators N or --scorers N")
    overview = read_overview(path)
    where = cluster_address(address, overview.holder)
    if where is None or not (overview.holder or address):
        raise UserError(f"scale: nobody works on {path}; if it runs on another machine, give its --address")
    from jobs.live import scale_live  # imports Ray

    return scale_live(where, overview.config, generators, scorers)


def show_runs(directory: str | Path, console: Console) -> None:
    """Print a table of the run folders in `directory`, a path or a URI.

    Raises:
        UserError: there is no such directory, or the store does not answer.
    """
    found = run_folders(directory)
    console.print(runs_table(found, time.time()) if found else f"no runs in {directory}")


def show_rounds(path: str | Path, console: Console) -> None:
    """Print the tables of a run in rounds, at a path or a URI.

    Raises:
        UserError: there is no such run, or it has no rounds.
    """
    from rayrlhf.reports.round_measures import read_rounds  # reads Parquet: only this command does
    from rayrlhf.reports.rounds import rounds_table

    run = run_at(path)
    if not has_rounds(run):
        raise UserError(f"{path}: no run in rounds (it has no rounds.json); the key rounds makes one")
    console.print(rounds_table(read_rounds(run)))
    if reason := stopped(run):
        console.print(f"no further round: {reason}", soft_wrap=True)


def status_screen(overview: Overview, live: Live | str | None, now: float) -> RenderableType:
    """The state of a run on one screen.

    Args:
        overview: the state as the run's folder tells it.
        live: the actors; a sentence on why they are not known; None if no process works on the run.
        now: Unix time.
    """
    parts: list[RenderableType] = [Text.assemble((overview.name, "bold"), f"  {_state(overview)}")]
    if overview.holder:
        parts.append(Text(overview.holder, style="dim"))
    parts.append(_stages(overview, now))
    if (newest := overview.newest) and newest.last:
        parts.append(Text(step_line(newest.name, newest.step, newest.steps, newest.last)))
    if isinstance(live, str):
        parts.append(Text(f"no live details: {live}", style="dim"))
    elif live:
        parts += [_actors(overview, live), _queue(live)]
    parts += [Text(f"warning: {text}", style="yellow") for text in overview.warnings]
    return Group(*parts)


def runs_table(runs: Sequence[RunFolder], now: float) -> Table:
    """One row for each run folder; `now` is Unix time."""
    table = Table()
    for heading in ("run", "state", "stages done", "at"):
        table.add_column(heading)
    shown = [STEP_MEASURES[name] for name in ("rl/reward/mean", "rl/kl")]
    for heading in (*(measure.words for measure in shown), "last written"):
        table.add_column(heading, justify="right")
    for run in runs:
        try:
            overview = read_overview(run.address)
        except UserError:
            table.add_row(run.name, "cannot be read: rayrlhf status says why", *"–––––")
            continue
        current = overview.current
        rl = next((stage.last for stage in overview.stages if stage.name == "rl"), None) or {}
        table.add_row(
            overview.name,
            _state(overview),
            f"{sum(stage.done for stage in overview.stages)} of {len(overview.stages)}",
            f"{current.name} {_steps(current)}" if current and current.step else current.name if current else "–",
            *("–" if rl.get(m.name) is None else m.number(rl[m.name]) for m in shown),
            "–" if overview.updated is None else f"{duration(now - overview.updated)} ago",
        )
    return table


def _state(overview: Overview) -> str:
    if overview.holder:
        return "running"
    return "not running" if overview.current else "finished"


def _steps(stage: StageOverview) -> str:
    return f"{stage.step}" if stage.steps is None else f"{stage.step}/{stage.steps}"


def _stages(overview: Overview, now: float) -> Table:
    table = Table("stage", "state", "steps", "time")
    for stage in overview.stages:
        if stage.done:
            state, said = "done", "" if stage.took_s is None else duration(stage.took_s)
        elif stage is overview.current and (overview.holder or stage.step):
            state = "running" if overview.holder else "interrupted"
            parts = []
            if overview.holder and stage.eta_s is not None:
                parts.append(f"ETA {duration(stage.eta_s)}")
            if stage.last:
                parts.append(f"last step {duration(now - stage.last['time'])} ago")
            said = ", ".join(parts)
        else:
            state, said = "waiting", ""
        table.add_row(stage.name, state, _steps(stage) if stage.step else "", said)
    return table


def _actors(overview: Overview, live: Live) -> Table:
    table = Table("actor", "state", "weights", "idle", "node", "process")
    last = (overview.newest and overview.newest.last) or {}
    listed = {actor.name for actor in live.actors}
    for actor in live.actors:
        version, idle = live.status.versions.get(actor.name), last.get(f"idle/{actor.name}")
        table.add_row(
            actor.name,
            actor.state.lower().replace("_", " "),
            "" if version is None or version < 0 else str(version),
            "" if idle is None else f"{idle:.0%}",
            actor.node,
            str(actor.pid or ""),
        )
    for name, version in live.status.versions.items():
        if name not in listed:  # without a dashboard only the coordinator knows them
            table.add_row(name, "", str(version), "", "", "")
    return table


def _queue(live: Live) -> Text:
    status = live.status
    pools = ", ".join(
        f"{count} of {status.wanted[role]} {role}s (replaced so far: {status.replacements[role]})"
        for role, count in status.actors.items()
    )
    places = ", ".join(f"{count} {place}" for place, count in status.groups.items())
    return Text(f"at work: {pools or 'nobody yet'}\nprompts: {places}\nweights published: {status.version}")
