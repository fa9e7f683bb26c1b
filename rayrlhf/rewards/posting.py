"""POST of JSON with retries: what rewards by a service and by a judge have in common."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rayrlhf.config_services import ServiceSection
from rayrlhf.errors import UserError, one_line

if TYPE_CHECKING:
    import httpx

FIRST_WAIT_S = 0.5
"""Before the second try; it doubles with every try, and is drawn from half of that to all of it."""
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
"""Status codes of a service that may answer later."""


def _ignored(index: int, answer: Any) -> None:
    pass


def post_all(
    service: ServiceSection,
    place: str,
    bodies: Sequence[Any],
    path: str = "",
    received: Callable[[int, Any], None] = _ignored,
) -> list[Any]:
    """The JSON answers to all bodies, in order; at most `concurrency` are under way at a time.

    If one fails for good, no further one is begun, those under way are awaited, and then the error is raised.

    Args:
        service: where to, and how patiently.
        place: who asks, for errors.
        bodies: JSON values.
        path: appended to the URL.
        received: is told index and answer of each as soon as it is there, in whatever order they come. What it raises
            counts as a failure of that body.

    Raises:
        UserError: the service refuses, gives up, or does not answer in JSON after all tries.
    """
    return asyncio.run(_post_all(service, place, bodies, path, received)) if bodies else []


async def _post_all(
    service: ServiceSection, place: str, bodies: Sequence[Any], path: str, received: Callable[[int, Any], None]
) -> list[Any]:
    import httpx  # here, because every actor of a run imports this file, and few of them post

    token = token_of(service, place)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    places = asyncio.Semaphore(service.concurrency)
    answers: list[Any] = [None] * len(bodies)
    failures: list[UserError] = []
    # Without the environment's proxies: an address on this machine or in the cluster is not reached through one.
    async with httpx.AsyncClient(timeout=service.timeout_s, headers=headers, trust_env=False) as client:

        async def post(index: int, body: Any) -> None:
            async with places:
                if failures:
                    return
                try:
                    answers[index] = await _post(client, service, place, service.url.rstrip("/") + path, body)
                    received(index, answers[index])
                except UserError as error:
                    failures.append(error)

        await asyncio.gather(*(post(index, body) for index, body in enumerate(bodies)))
    if failures:
        raise failures[0]
    return answers


def token_of(service: ServiceSection, place: str) -> str | None:
    """The value of the environment variable `token_variable`; None where the config names none.

    Raises:
        UserError: it is not set on this node.
    """
    if service.token_variable is None:
        return None
    token = os.environ.get(service.token_variable)
    if not token:
        raise UserError(f"{place}: the environment variable {service.token_variable} is not set on this node")
    return token


async def _post(client: httpx.AsyncClient, service: ServiceSection, place: str, url: str, body: Any) -> Any:
    import httpx

    for attempt in range(service.retries + 1):
        try:
            response = await client.post(url, json=body)
            if response.status_code < 400:
                return response.json()
            failure = f"status {response.status_code}: {_beginning(response)}"
            if response.status_code not in RETRIED:
                raise UserError(f"{place}: {failure}")
        except httpx.TimeoutException:
            failure = f"no answer for {service.timeout_s} s"
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__}: {one_line(error)}"
        except ValueError:
            raise UserError(f"{place}: its answer is no JSON: {_beginning(response)}") from None
        if attempt < service.retries:
            await asyncio.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0))
    raise UserError(f"{place}: {failure}, after {service.retries + 1} tries")


def _beginning(response: httpx.Response) -> str:
    """Of what the service said, in one line."""
    return " ".join(response.text.split())[:200]
