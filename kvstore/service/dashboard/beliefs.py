"""What the policies believe, for the page. It takes a tenth of a second of CPU where much was learned, so the last look
at a store is kept and shared by all who watch, and made in a thread, without the store's lock.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.admin import PolicyView
from kvstore.errors import StoreClosed
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.dashboard.models import Shown
from kvstore.service.http import policies_api
from kvstore.service.http.answers import PoliciesAnswer
from kvstore.service.http.routes import ApiCall, Route

FRESH_S = 5.0
MAX_CLASSES = 48  # of a policy
MAX_STORES = 8  # told at once: an operator chooses one of more


@dataclass(slots=True)
class _Look:
    at: float
    views: asyncio.Task[list[PolicyView]]


class Beliefs:
    """Answers the page's question about policies."""

    def __init__(self, visible: Callable[[ApiCall, Shown], list[OpenStore]]) -> None:
        """visible: the stores that a tenant may see."""
        self._visible = visible
        self._looks: dict[tuple[str, str], _Look] = {}

    def routes(self) -> list[Route]:
        """Its part of the table."""
        return [
            Route("GET", "/v1/dashboard/policies", self.policies, "What the policies believe.", query=Shown,
                  answer=PoliciesAnswer, errors=(404,)),
        ]  # fmt: skip

    async def policies(self, call: ApiCall) -> PoliciesAnswer:
        stores = self._visible(call, call.body)[:MAX_STORES]
        return policies_api.answer([(one, await self._at(one)) for one in stores], MAX_CLASSES)

    async def _at(self, opened: OpenStore) -> Sequence[PolicyView]:
        place = (opened.tenant.name, opened.id)
        look = self._looks.get(place)
        if look is None or time.monotonic() - look.at > FRESH_S:
            task = asyncio.create_task(asyncio.to_thread(opened.store.admin.beliefs))
            look = self._looks[place] = _Look(time.monotonic(), task)
        try:
            return await asyncio.shield(look.views)
        except StoreClosed:
            return []
