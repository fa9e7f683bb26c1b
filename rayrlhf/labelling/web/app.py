"""The application: pages for labellers and for the admin, and the three calls of the script."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from rayrlhf.errors import UserError
from rayrlhf.labelling import exports
from rayrlhf.labelling.assignment import Assigner, Assignment, shown_order
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Judgement
from rayrlhf.labelling.web.admin import Overview
from rayrlhf.labelling.web.messages import FLAGS, REASONS, Sent, as_shown, standing
from rayrlhf.labelling.web.security import Guard, RateLimit, Tokens
from rayrlhf.terminal import say

HERE = Path(__file__).parent
# Markup of its own is escaped, and images would be requests to elsewhere.
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


@dataclass(frozen=True)
class Site:
    """What the page shows, and how."""

    database: LabelDatabase
    tokens: Tokens
    assigner: Assigner
    title: str
    """Of the run."""
    instructions: str
    """Markdown."""
    url: str
    """Where browsers find the page, without a slash at the end."""
    mode: str = "rank"
    """`rank`, or `pairs`."""
    ratings: bool = False
    """Whether each answer may also be rated from 1 to 7."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, for the limits on requests."""

    def link(self, name: str) -> str:
        """The link by which a labeller comes in."""
        return f"{self.url}/enter/{self.tokens.of(name)}"


def application(site: Site) -> Starlette:
    """The application of one run's labels."""
    pages = Pages(site)
    routes = [
        Route("/", pages.label),
        Route("/enter/{token}", pages.enter),
        Route("/history", pages.history),
        Route("/admin", pages.admin),
        Route("/export/{name}", pages.export),
        Route("/api/item", pages.item),
        Route("/api/judgement", pages.judge, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    # Only the names by which the page is meant to be found: another site's name that leads here is a way round the
    # browser's rules (DNS rebinding).
    own = urlsplit(site.url).hostname or "localhost"
    hosts = ["localhost", "127.0.0.1", f"[{own}]" if ":" in own else own]  # IPv6 is in brackets in a header
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: pages.refuse, UserError: pages.fail},
    )


class Pages:
    """The answers to requests. Starlette runs them in threads."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.database = site.database
        self.overview = Overview(site.database)
        self.templates = Jinja2Templates(directory=HERE / "templates")
        self.templates.env.globals.update(
            site=site,
            root=urlsplit(site.url).path,  # behind a proxy, the page may be below a path
            instructions=_markdown.render(site.instructions),
            kinds=FLAGS,
            reasons=REASONS,
            when=lambda at: time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at else "",
        )
        self.known = RateLimit(rate=10, burst=60, clock=site.clock)
        self.strangers = RateLimit(rate=0.5, burst=20, clock=site.clock)

    # --- Pages -------------------------------------------------------------------------------------------------------

    def enter(self, request: Request) -> Response:
        """A labeller's link: keeps the token in a cookie, and shows the instructions.

        The cookie is not sent with a request that began on another site (SameSite=Strict), such as the one after a
        link in a mail. So this is a page with a link to go on, and no redirect.
        """
        name = self._name(request, request.path_params["token"])
        response = self._page(request, "enter.html", name)
        response.set_cookie(
            self.site.tokens.cookie,
            self.site.tokens.of(name),
            max_age=90 * 24 * 3600,
            httponly=True,
            samesite="strict",
            secure=self.site.url.startswith("https:"),
        )
        return response

    def label(self, request: Request) -> Response:
        """The page on which answers are ranked; its script fetches the item."""
        return self._page(request, "label.html", self._name(request))

    def history(self, request: Request) -> Response:
        """What the labeller has said so far, the newest first."""
        name = self._name(request)
        own = list(reversed(self.database.judgements(name)))
        return self._page(
            request, "history.html", name, own=own, prompts={i.id: i.prompt for i in self.database.items()}
        )

    def admin(self, request: Request) -> Response:
        """Progress and agreement of all labellers."""
        name = self._name(request, admin=True)
        links = {other: self.site.link(other) for other in self.database.labellers()}
        return self._page(request, "admin.html", name, links=links, **self.overview.figures())

    def export(self, request: Request) -> Response:
        """A file of judgements, for the admin."""
        self._name(request, admin=True)
        kinds: dict[str, Callable[..., Any]] = {
            "rankings.jsonl": exports.rankings,
            "pairs.jsonl": exports.pairs,
            "judgements.jsonl": exports.rows,
        }
        name = request.path_params["name"]
        if name not in kinds:
            raise HTTPException(404, f"there are {', '.join(kinds)}")
        content = list(kinds[name](self.database.items(), self.database.judgements()))
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(exports.lines(content), media_type="application/x-ndjson", headers=headers)

    # --- Calls of the script -----------------------------------------------------------------------------------------

    def item(self, request: Request) -> Response:
        """The labeller's next item, or the one that the query names, if it was theirs before."""
        name = self._name(request)
        if "item" in request.query_params:
            task = Assignment(request.query_params["item"], int(request.query_params.get("repeat") == "1"))
            if self.database.newest(task.item, name, task.repeat):
                return self._item(name, task)
        return self._item(name, self.site.assigner.next(name))

    async def judge(self, request: Request) -> Response:
        """Keep a judgement. The answer comes when it is on the disk."""
        return await run_in_threadpool(self._judge, self._changing(request), await request.body())

    async def undo(self, request: Request) -> Response:
        """Withdraw the newest judgement, and show its item again as it was."""
        return await run_in_threadpool(self._undo, self._changing(request))

    def _judge(self, name: str, body: bytes) -> Response:
        try:
            sent = Sent.model_validate_json(body)
            item = self.database.item(sent.item)
            if item is None:
                raise ValueError("no such item")
            shown = shown_order(self.site.assigner.order, name, item.id, sent.repeat, len(item.answers))
            judgement = sent.judgement(item, name, shown)
        except ValidationError as error:
            first = error.errors()[0]
            raise HTTPException(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        self.database.judge(judgement, f"{name} {sent.key}")
        return JSONResponse({"saved": True})

    def _undo(self, name: str) -> Response:
        undone = self.database.undo(name, self.site.assigner.lease_s)
        if undone is None:
            raise HTTPException(404, "there is nothing to undo")
        return self._item(name, Assignment(undone.item, undone.repeat), undone)

    def _item(self, name: str, task: Assignment | None, mine: Judgement | None = None) -> Response:
        content: dict[str, Any] = {"item": None, "standing": standing(self.site.assigner, name)}
        if task:
            item = self.database.item(task.item)
            assert item is not None  # a lease names an item of the table
            mine = mine or self.database.newest(item.id, name, task.repeat)
            content["item"] = as_shown(item, task, name, self.site.assigner.order, mine)
        return JSONResponse(content)

    # --- Who asks ----------------------------------------------------------------------------------------------------

    def _name(self, request: Request, token: str | None = None, admin: bool = False) -> str:
        """The labeller whose request it is.

        Raises:
            HTTPException: nobody's (401), of too many (429), or the admin's pages are for another role (403).
        """
        name = self.site.tokens.name(token or request.cookies.get(self.site.tokens.cookie, ""))
        role = self.database.labellers().get(name or "")
        limit, key = (self.known, name) if name and role else (self.strangers, request.client and request.client.host)
        if not limit.allows(key or ""):
            raise HTTPException(429, "too many requests; wait a moment", {"Retry-After": "2"})
        if name is None or role is None:
            raise HTTPException(401, "open the link that you were given; this one is not known here")
        if admin and role != "admin":
            raise HTTPException(403, "this page is for the admin")
        return name

    def _changing(self, request: Request) -> str:
        """The labeller whose request it is, one that changes something and came from our own page."""
        name = self._name(request)
        given = request.headers.get("X-CSRF-Token", "")
        if not self.site.tokens.csrf_fits(name, self.database.identity, given):
            raise HTTPException(403, "the page is too old; load it again")
        return name

    # --- Rendering ---------------------------------------------------------------------------------------------------

    def _page(self, request: Request, template: str, name: str, **values: Any) -> Response:
        labels = self.database.identity
        csrf = self.site.tokens.csrf(name, labels)
        values |= {"name": name, "role": self.database.labellers()[name], "labels": labels, "csrf": csrf}
        return self.templates.TemplateResponse(request, template, values)

    def refuse(self, request: Request, error: Exception) -> Response:
        """What a request gets that cannot be answered: JSON for the script, else a page."""
        assert isinstance(error, HTTPException)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        return self.templates.TemplateResponse(
            request, "refused.html", {"detail": error.detail}, error.status_code, error.headers
        )

    def fail(self, request: Request, error: Exception) -> Response:
        """What a request gets that the database cannot serve now: the script tries again, and the terminal says why."""
        say(f"label: {error}")
        return self.refuse(request, HTTPException(503, "what you say cannot be stored now; tell who runs this page"))
