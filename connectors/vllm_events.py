"""KV events for routers: what can be had from this engine beside its own cache, in vLLM's words and hashes.

The store tells what came to host memory and to disk and what left them, by names of its own (vLLM's hash, bound to the
namespace). Here those become `BlockStored` and `BlockRemoved` with vLLM's hash: of blocks that a request of this engine
has named since it started. What lies on disk from before is announced when it is fetched for a request, and never taken
back unless it was announced. Redis is not told of: it belongs to no engine, and nobody hears what it evicts.

The scheduler's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.plan.journal import BlockEvent, Event
from kvstore.plan.records import HOST

MEDIA = {HOST: "CPU", "disk": "STORAGE"}
MAX_NAMES = 1 << 16  # blocks of requests that are not (yet) stored anywhere


class News(NamedTuple):
    """Blocks of one of vLLM's layer groups that came to a medium or left it. group: None if there is only one."""

    is_stored: bool
    medium: str
    group: int | None
    hashes: list[bytes]


@dataclass(slots=True)
class _Announced:
    name: bytes
    places: set[tuple[str, int]] = field(default_factory=set)  # (tier, group)


class Announcer:
    """Turns the store's events into vLLM's.

    group_ids: vLLM's number of each of our groups.
    """

    def __init__(self, group_ids: Sequence[int]) -> None:
        self._group_ids: Sequence[int | None] = group_ids if len(group_ids) > 1 else (None,)
        self._names: OrderedDict[bytes, bytes] = OrderedDict()
        self._announced: dict[bytes, _Announced] = {}

    def name(self, keys: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """Learn what vLLM calls blocks of ours."""
        for key, name in zip(keys, hashes, strict=True):
            if key not in self._announced:
                self._keep(key, name)

    def tell(self, events: Iterable[BlockEvent]) -> list[News]:
        """What routers should hear, in order, as few messages as that allows."""
        news: list[News] = []
        for event in events:
            if event.tier not in MEDIA:
                continue
            is_stored = event.event is Event.STORED
            note = self._came if is_stored else self._left
            hashes = [name for key in event.keys if (name := note(key, (event.tier, event.group))) is not None]
            if not hashes:
                continue
            head = (is_stored, MEDIA[event.tier], self._group_ids[event.group])
            if news and news[-1][:3] == head:
                news[-1].hashes.extend(hashes)
            else:
                news.append(News(*head, hashes))
        return news

    def forget(self) -> None:
        """Everything was taken back."""
        self._names.clear()
        self._announced.clear()

    def _came(self, key: bytes, place: tuple[str, int]) -> bytes | None:
        known = self._announced.get(key)
        if known is None:
            name = self._names.pop(key, None)
            if name is None:
                return None
            known = self._announced[key] = _Announced(name)
        if place in known.places:
            return None
        known.places.add(place)
        return known.name

    def _left(self, key: bytes, place: tuple[str, int]) -> bytes | None:
        known = self._announced.get(key)
        if known is None or place not in known.places:
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
