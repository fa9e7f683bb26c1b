"""`rayrlhf label RUN`: serves the page on which people rank a run's answers, and moves judgements in and out.

The page runs beside the command that waits for it, on the machine that has the run's folder. It needs no Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from jobs.console import console
from jobs.listening import LOOPBACK, listen
from rayrlhf.config_labellers import MOST_ANSWERS
from rayrlhf.errors import UserError
from rayrlhf.labelling import exports
from rayrlhf.labelling.assignment import Assigner
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item
from rayrlhf.labelling.web.app import Site, application
from rayrlhf.labelling.web.security import Tokens
from rayrlhf.rewards.labellers import read_unranked
from rayrlhf.runs.folder import RunFolder, run_at
from rayrlhf.runs.labels import COPY_S, begin_with_labels, copy_labels_out
from rayrlhf.terminal import say

ADMIN = "admin"
"""The name of the admin's link."""
WEB = ("http://", "https://")

INSTRUCTIONS = """Rank the answers: 1 is the best one.

- Read the prompt, then **all** answers, before you rank the first one.
- Judge what the answer says: is it true, does it do what was asked, does it leave out what is harmful?
- Length alone is no merit.
- Give two answers the same rank if you cannot tell which is better.
- Skip what you cannot judge; flag what should not be there.
"""
"""Where the run has no instructions of its own."""


@dataclass(frozen=True)
class Serving:
    """How the page is served; see `rayrlhf label --help`."""

    host: str = "127.0.0.1"
    port: int = 8100
    public_url: str | None = None
    labellers: str | None = None
    overlap: int | None = None
    mode: str = "rank"
    ratings: bool = False
    seed: int | None = None
    repeats: float = 0.05
    gold: Path | None = None
    instructions: Path | None = None

    def check(self) -> None:
        """Look at what the command line alone can get wrong.

        Raises:
            UserError: a value does not fit.
        """
        if self.mode not in ("rank", "pairs"):
            raise UserError(f"label: --mode {self.mode!r} must be rank or pairs")
        if self.overlap is not None and self.overlap < 1:
            raise UserError(f"label: --overlap {self.overlap} must be 1 or more")
        if not 0 <= self.repeats <= 0.5:
            raise UserError(f"label: --repeats {self.repeats} must be a share from 0 to 0.5")
        if not 0 <= self.port <= 65535:
            raise UserError(f"label: --port {self.port} must be from 0 to 65535")
        if self.public_url and not (urlsplit(self.public_url).hostname and self.public_url.startswith(WEB)):
            raise UserError(f"label: --public-url {self.public_url!r} must begin with http:// or https:// and a name")
        if self.host not in LOOPBACK and not self.public_url:
            raise UserError(
                f"label: --host {self.host} lets other machines in; say with --public-url where they find the page, "
                "best an https:// address of a proxy"
            )


def label(
    address: str,
    serving: Serving,
    export: Path | None = None,
    imported: Path | None = None,
    forget: str | None = None,
) -> None:
    """Import, forget and export, each if asked for; if none is, serve the page until Ctrl-C.

    Raises:
        UserError: the run has no answers to rank, or an option or file does not fit.
    """
    serving.check()
    run = run_at(address)
    with open_labels(run) as database:
        if imported:
            added = exports.import_rankings(database, imported, time.time())
            console.print(f"label: {added} rankings added from {imported}")
        if forget:
            rows = database.forget(forget)
            console.print(
                f"label: {rows} rows of {forget!r} deleted from {database.path}; files exported before keep them"
            )
        if export:
            print_export(database, export)
        if not (imported or forget or export):
            serve(run, database, serving)


@contextlib.contextmanager
def open_labels(run: RunFolder) -> Iterator[LabelDatabase]:
    """The database of a run's labels, with the answers of `to_rank.jsonl`; for a run in a store it is copied there.

    Raises:
        UserError: the run has neither, or this machine and another one have both added judgements.
    """
    begin_with_labels(run)
    waiting = run.read(run.to_rank) is not None
    if not waiting and not run.labels.exists():
        raise UserError(
            f"{run.address} has no answers to rank; run collect with collect.labeller.kind=file (or people) first"
        )
    database = LabelDatabase(run.labels)
    try:
        if waiting:
            known = {item.id: item.answers for item in database.items()}
            unranked = read_unranked(run.download(run.to_rank))
            # What collect has put there stays as it is, but for answers that were sampled again: that is refused.
            database.add_items([Item(u.id, u.prompt, u.answers) for u in unranked if known.get(u.id) != u.answers])
        yield database
        copy_labels_out(run, database)
    finally:
        database.close()


def print_export(database: LabelDatabase, directory: Path) -> None:
    """Write all files, and say what they hold and what is not in them."""
    counts = exports.export(database, directory)
    console.print(f"label: written into {directory}: {', '.join(f'{name} ({rows})' for name, rows in counts.items())}")
    progress = database.progress()
    if waiting := [item for item, done in progress.items() if not done]:
        console.print(
            f"label: {len(waiting)} of {len(progress)} items have no judgement, first {waiting[0]!r}; "
            "rankings.jsonl lacks them, and collect asks for all"
        )


def serve(run: RunFolder, database: LabelDatabase, serving: Serving) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    names = prepare(run, database, serving)
    if said := missing_people(database, serving, names):
        console.print(f"label: {said}", soft_wrap=True)
    with listen(serving.host, serving.port, "label") as listening:
        port = listening.getsockname()[1]
        host = f"[{serving.host}]" if ":" in serving.host else serving.host
        url = (serving.public_url or f"http://{host}:{port}").rstrip("/")
        site = make_site(run, database, serving, url)
        console.print(
            f"label: {len(database.items())} items, {len(database.judgements())} judgements in {database.path}"
        )
        for name in names:
            # Not through rich: it would break a long link.
            say(f"label: {name}: {site.link(name)}")
        say("label: each link is for one person; Ctrl-C ends the page, and the same command opens it again")
        server = uvicorn.Server(
            uvicorn.Config(
                application(site),
                log_level="warning",
                access_log=False,  # it would hold the tokens
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        try:
            with every(COPY_S, lambda: copy_labels_out(run, database), only=run.store is not None):
                server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
    console.print(f"label: closed with {len(database.judgements())} judgements in {database.path}")


def prepare(run: RunFolder, database: LabelDatabase, serving: Serving) -> list[str]:
    """Note what the options say about labellers, gold items and the order. Returns the names, the admin last.

    Raises:
        UserError: a name or a file does not fit, an item has more answers than the page can show, or the labels began
            with another seed.
    """
    for item in database.items():
        if len(item.answers) > MOST_ANSWERS:
            raise UserError(
                f"label: item {item.id!r} has {len(item.answers)} answers, and the page ranks {MOST_ANSWERS} at most; "
                "lower collect.answers_per_prompt and sample anew, or rank them in a file (collect.labeller.kind=file)"
            )
    names = [
        exports.check_name(name.strip(), "label: --labellers")
        for name in (serving.labellers or "").split(",")
        if name.strip()
    ]
    if ADMIN in names:
        raise UserError(f"label: --labellers: {ADMIN!r} has a link of its own; choose another name")
    known = [name for name, role in database.labellers().items() if role == "labeller"]
    for name in names or ([] if known else ["labeller"]):
        database.add_labeller(name)
    database.add_labeller(ADMIN, "admin")
    order = f"{run.name}/{serving.seed or 0}"
    begun = database.recall("order")
    if begun is None:
        database.remember("order", order)
    elif serving.seed is not None and begun.rpartition("/")[2] != str(serving.seed):
        raise UserError(
            f"label: --seed {serving.seed}, but {database.path} began with {begun.rpartition('/')[2]}; leave it out"
        )
    if serving.gold:
        console.print(f"label: {exports.mark_gold(database, serving.gold)} gold items from {serving.gold}")
    return [name for name, role in database.labellers().items() if role == "labeller"] + [ADMIN]


def missing_people(database: LabelDatabase, serving: Serving, names: list[str]) -> str | None:
    """What keeps a run that waits from having enough judgements, however long these people work; None if nothing does.

    Args:
        names: of all who have a link, the admin too.
    """
    wanted = database.recall("overlap")
    if wanted is None:  # no run waits
        return None
    if (serving.overlap or wanted) < wanted:
        return (
            f"--overlap {serving.overlap}, but the run waits for {wanted} labellers of each item "
            "(collect.labeller.labellers): it would wait for ever; leave --overlap out"
        )
    people = [name for name in names if name != ADMIN]
    if len(people) < wanted:
        return (
            f"the run waits for {wanted} labellers of each item (collect.labeller.labellers), and there are "
            f"{len(people)} ({', '.join(people)}): it waits until there are more; name them with --labellers"
        )
    return None


def make_site(run: RunFolder, database: LabelDatabase, serving: Serving, url: str) -> Site:
    """What the page shows."""
    own = run.path / "instructions.md"
    path = serving.instructions or own
    try:
        # That of the run may be in a store only.
        given = path.read_bytes() if serving.instructions else run.read(own)
        instructions = INSTRUCTIONS if given is None else given.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"label: the instructions {path} cannot be read ({error})") from None
    overlap = serving.overlap or database.recall("overlap", 1)
    return Site(
        database=database,
        tokens=Tokens.read(run.path / ".labels.secret"),
        assigner=Assigner(database, overlap=overlap, repeats=serving.repeats),
        title=run.name,
        instructions=instructions,
        url=url,
        mode=serving.mode,
        ratings=serving.ratings,
    )


@contextlib.contextmanager
def every(seconds: float, action: Callable[[], Any], only: bool = True) -> Iterator[None]:
    """During the block, call `action` now and then in a thread, if `only`. What it raises is said and tried again."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(seconds):
            try:
                action()
            except Exception as error:  # the store may be away for a while; people go on judging
                console.print(f"label: the copy of the labels waits ({error})")

    thread = threading.Thread(target=loop, name="copy of the labels", daemon=True)
    if only:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if only:
            thread.join()
