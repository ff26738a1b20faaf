"""KV events for routers: what can be had from this engine beside its own cache, in vLLM's words and hashes.

The store, in this process or a daemon's, tells what came to host memory and to disk and what left them, by names of its
own (vLLM's hash, bound to the namespace). Here those become `BlockStored` and `BlockRemoved` with vLLM's hash: of
blocks that a request of this engine has named since it started, whoever saved them. What lies on disk from before is
announced when it is fetched for a request, and never taken back unless it was announced. Redis is not told of: it
belongs to no engine, and nobody hears what it evicts.

The hard thing: a router may believe too little, never too much. So when the store says that events were lost, or the
daemon that had it all is gone, everything that was announced is taken back.

The scheduler's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.base import HOST, BlockEvent, Event
from kvstore.tiers import registry

CPU, STORAGE = "CPU", "STORAGE"  # vLLM's words
MAX_NAMES = 1 << 16  # blocks of requests that are not (yet) stored anywhere
MAX_UNNAMED = 1 << 16  # blocks others stored that no request here has asked for (yet)

Place = tuple[str, int]  # tier, group


class News(NamedTuple):
    """Blocks of one of vLLM's layer groups that came to a medium or left it. group: None if there is only one."""

    is_stored: bool
    medium: str
    group: int | None
    hashes: list[bytes]


@dataclass(slots=True)
class _Announced:
    name: bytes
    places: set[Place] = field(default_factory=set)


class Announcer:
    """Turns the store's events into vLLM's.

    group_ids: vLLM's number of each of our groups.
    """

    def __init__(self, group_ids: Sequence[int]) -> None:
        self._group_ids: Sequence[int | None] = group_ids if len(group_ids) > 1 else (None,)
        self._names: OrderedDict[bytes, bytes] = OrderedDict()
        self._announced: dict[bytes, _Announced] = {}
        self._unnamed: OrderedDict[bytes, set[Place]] = OrderedDict()
        self._found: list[News] = []  # of what was stored before it was named

    def name(self, keys: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """Learn what vLLM calls blocks of ours."""
        found: dict[Place, list[bytes]] = {}
        for key, name in zip(keys, hashes, strict=True):
            if key in self._announced:
                continue
            places = self._unnamed.pop(key, None)
            if places is None:
                self._keep(key, name)
                continue
            self._announced[key] = _Announced(name, places)
            for place in places:
                found.setdefault(place, []).append(name)
        for place, names in found.items():
            self._add(self._found, True, place, names)

    def tell(self, events: Iterable[BlockEvent]) -> list[News]:
        """The events for routers, in order, as few messages as that allows."""
        news, self._found = self._found, []
        for event in events:
            place = (event.tier, event.group)
            if event.event in (Event.CLEARED, Event.DROPPED):
                self._take_back(news)
            elif _medium(event.tier):
                is_stored = event.event is Event.STORED
                note = self._came if is_stored else self._left
                hashes = [name for key in event.keys if (name := note(key, place)) is not None]
                self._add(news, is_stored, place, hashes)
        return news

    def forget(self) -> None:
        """Everything was taken back."""
        self._names.clear()
        self._announced.clear()
        self._unnamed.clear()
        self._found.clear()

    def _add(self, news: list[News], is_stored: bool, place: Place, hashes: list[bytes]) -> None:
        tier, group = place
        head = (is_stored, _medium(tier), self._group_ids[group])
        if not hashes:
            return
        if news and news[-1][:3] == head:
            news[-1].hashes.extend(hashes)
        else:
            news.append(News(*head, hashes))

    def _take_back(self, news: list[News]) -> None:
        taken: dict[Place, list[bytes]] = {}
        for key, known in self._announced.items():
            for place in known.places:
                taken.setdefault(place, []).append(known.name)
            self._keep(key, known.name)
        self._announced.clear()
        self._unnamed.clear()
        for place, hashes in taken.items():
            self._add(news, False, place, hashes)

    def _came(self, key: bytes, place: Place) -> bytes | None:
        known = self._announced.get(key)
        if known is None:
            name = self._names.pop(key, None)
            if name is None:
                self._unnamed.setdefault(key, set()).add(place)
                if len(self._unnamed) > MAX_UNNAMED:
                    self._unnamed.popitem(last=False)
                return None
            known = self._announced[key] = _Announced(name)
        if place in known.places:
            return None
        known.places.add(place)
        return known.name

    def _left(self, key: bytes, place: Place) -> bytes | None:
        known = self._announced.get(key)
        if known is None:
            places = self._unnamed.get(key, set())
            places.discard(place)
            if not places:
                self._unnamed.pop(key, None)
            return None
        if place not in known.places:
            return None
        known.places.discard(place)
        if not known.places:
            del self._announced[key]
            self._keep(key, known.name)  # it may come again
        return known.name

    def _keep(self, key: bytes, name: bytes) -> None:
        self._names[key] = name
        self._names.move_to_end(key)
        if len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)


def _medium(tier: str) -> str:
    """vLLM's word for a tier of this machine; "" for one that routers are not told of."""
    return CPU if tier == HOST else STORAGE if registry.medium(tier) == "storage" else ""
