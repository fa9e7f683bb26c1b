"""POST of JSON with retries: what rewards by a service and by a judge have in common."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rayrlhf.errors import UserError, one_line

if TYPE_CHECKING:
    import httpx

FIRST_WAIT_S = 0.5
"""Before the second try; it doubles with every try, and is drawn from half of that to all of it."""
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
"""Status codes of a service that may answer later."""


class Service(Protocol):
    """How a config says where a service is and how patient to be; see `rayrlhf.config_rewards.ServiceReward`."""

    @property
    def url(self) -> str: ...
    @property
    def timeout_s(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def token_variable(self) -> str | None: ...


def post_all(service: Service, place: str, bodies: Sequence[Any], path: str = "") -> list[Any]:
    """The JSON answers to all bodies, in order; at most `concurrency` are under way at a time.

    Args:
        service: where to, and how patiently.
        place: who asks, for errors.
        bodies: JSON values.
        path: appended to the URL.

    Raises:
        UserError: the service refuses, gives up, or does not answer in JSON after all tries.
    """
    return asyncio.run(_post_all(service, place, bodies, path))


async def _post_all(service: Service, place: str, bodies: Sequence[Any], path: str) -> list[Any]:
    import httpx  # here, because every actor of a run imports this file, and few of them post

    headers = {}
    if service.token_variable is not None:
        token = os.environ.get(service.token_variable)
        if not token:
            raise UserError(f"{place}: the environment variable {service.token_variable} is not set on this node")
        headers["Authorization"] = f"Bearer {token}"
    places = asyncio.Semaphore(service.concurrency)
    # Without the environment's proxies: an address on this machine or in the cluster is not reached through one.
    async with httpx.AsyncClient(timeout=service.timeout_s, headers=headers, trust_env=False) as client:

        async def post(body: Any) -> Any:
            async with places:
                return await _post(client, service, place, service.url.rstrip("/") + path, body)

        return await asyncio.gather(*(post(body) for body in bodies))


async def _post(client: httpx.AsyncClient, service: Service, place: str, url: str, body: Any) -> Any:
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
