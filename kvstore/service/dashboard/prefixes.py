"""The stored prefixes as a tree that can be opened, hottest branches first.

Looking through a store takes a microsecond or less per block, in steps with the lock released between
(plan/prefixes.py).
Somebody who watches asks every few seconds; so the last look is kept, shared by all who watch, and renewed no more
often than that it costs a twentieth of a core. It is forgotten when nobody watches.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from kvstore.plan.prefixes import Prefix, Tour
from kvstore.plan.state import SHARED_SESSION
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.dashboard.models import PREFIX_ID_DIGITS, Level, PrefixNode

SHARE = 20  # a look may be renewed after so many times the time it took
FRESH_S = 1.0
PATIENCE_S = 0.25  # an older look is better than a longer wait
FORGET_S = 60.0
MAX_BRANCHES = 12  # told of one prefix


@dataclass(slots=True)
class _Sum:
    """A prefix with all that continues it."""

    prefix: Prefix
    hits: int
    blocks: int
    used_at: float


class Look:
    """The sums over one walk through a store. Immutable."""

    def __init__(self, opened: OpenStore, tour: Tour) -> None:
        self.is_cut = tour.is_cut
        self.num_blocks = sum(prefix.num_blocks for prefix in tour.prefixes)
        self._opened = opened
        self._now = tour.now
        sums = {
            prefix.key: _Sum(prefix, prefix.num_loads, prefix.num_blocks, max(prefix.loaded_at, prefix.touched_at))
            for prefix in tour.prefixes
        }
        self._children: dict[str, list[_Sum]] = {"": []}
        # Those that continue a prefix come after it: backwards, a sum is whole before it is added to the one above.
        for prefix in reversed(tour.prefixes):
            own = sums[prefix.key]
            above = None if prefix.parent is None else sums[prefix.parent]
            if above is not None:
                above.hits += own.hits
                above.blocks += own.blocks
                above.used_at = max(above.used_at, own.used_at)
            self._children.setdefault("" if above is None else _id(above.prefix), []).append(own)
        for members in self._children.values():
            members.sort(key=lambda own: (-own.hits, -own.blocks, own.prefix.key))

    def level(self, under: str) -> Level | None:
        """The branches of a prefix, "" for the roots; None if it is not known or ends there."""
        members = self._children.get(under)
        if members is None:
            return None
        return Level(
            nodes=[self._node(own) for own in members[:MAX_BRANCHES]], more=max(0, len(members) - MAX_BRANCHES)
        )

    def _node(self, own: _Sum) -> PrefixNode:
        prefix, layout = own.prefix, self._opened.layout
        used_s = self._now - own.used_at
        return PrefixNode(
            id=_id(prefix),
            tenant=self._opened.tenant.name,
            namespace=self._opened.id,
            depth_tokens=prefix.depth * layout.block_size,
            tokens=prefix.num_blocks * layout.block_size,
            bytes={tier: pages * layout.slot_bytes for tier, pages in prefix.pages.items() if pages},
            deep_tokens=own.blocks * layout.block_size,
            hits=own.hits,
            branches=prefix.num_children,
            used_s=used_s if used_s < float("inf") else None,
            session="" if prefix.session.startswith("\0") else prefix.session,
            is_shared=prefix.session == SHARED_SESSION or prefix.num_children > 1,
        )


class Looks:
    """The last look at every store that somebody watches."""

    def __init__(self) -> None:
        self._looks: dict[tuple[str, str], tuple[Look, float, float]] = {}  # the look, when it ended, how long it took
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def at(self, opened: OpenStore) -> tuple[Look, float]:
        """A look at a store and its age in seconds: fresh, or the last one if a fresh one would take long."""
        place = (opened.tenant.name, opened.id)
        self.forget_old()
        known = self._looks.get(place)
        if known is None or time.monotonic() - known[1] > max(FRESH_S, SHARE * known[2]):
            task = self._tasks.get(place)
            if task is None:
                task = self._tasks[place] = asyncio.get_running_loop().create_task(self._tour(place, opened))
            await asyncio.wait({task}, timeout=None if known is None else PATIENCE_S)
            if task.done():
                task.result()
        look, ended, _ = self._looks[place]
        return look, time.monotonic() - ended

    async def close(self) -> None:
        """Stop looking. Idempotent."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._looks.clear()

    def forget_old(self) -> None:
        """Drop results that were not asked for lately."""
        now = time.monotonic()
        for place in [
            place for place, (_, ended, took) in self._looks.items() if now - ended > FORGET_S + SHARE * took
        ]:
            del self._looks[place]

    async def _tour(self, place: tuple[str, str], opened: OpenStore) -> None:
        try:
            tour, took = Tour(), 0.0
            is_over = False
            while not is_over:
                began = time.monotonic()
                is_over = opened.store.admin.guide(tour)
                took += time.monotonic() - began
                await asyncio.sleep(0)  # others are served between the steps
            began = time.monotonic()
            look = await asyncio.to_thread(Look, opened, tour)
            ended = time.monotonic()
            self._looks[place] = (look, ended, took + ended - began)
        finally:
            del self._tasks[place]


def merged(levels: list[Level]) -> Level:
    """The hottest of several stores' branches."""
    nodes = sorted((node for level in levels for node in level.nodes), key=lambda node: (-node.hits, -node.deep_tokens))
    more = sum(level.more for level in levels) + max(0, len(nodes) - MAX_BRANCHES)
    return Level(nodes=nodes[:MAX_BRANCHES], more=more)


def _id(prefix: Prefix) -> str:
    return prefix.key.hex()[:PREFIX_ID_DIGITS]
