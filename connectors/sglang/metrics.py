"""Pages and speeds of transfers, as SGLang's metrics want them: a number a call since they were last taken."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

MAX_CALLS = 4096  # a server whose metrics nobody reads must not grow
GB = 1e9


class Moved(Protocol):
    """Counters that grow with what is moved."""

    loaded_pages: int
    loaded_bytes: int
    stored_pages: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Pages and GB/s, one each for a call."""

    loads: list[int]
    saves: list[int]
    load_speeds: list[float]
    save_speeds: list[float]


class Bandwidths:
    """Notes calls. SGLang loads in one thread, saves in another, and reads in a third."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._loads: deque[tuple[int, float]] = deque(maxlen=MAX_CALLS)
        self._saves: deque[tuple[int, float]] = deque(maxlen=MAX_CALLS)

    @contextmanager
    def of_load(self, counters: Moved) -> Iterator[None]:
        """Note what a load within adds to `counters`."""
        began, pages, num_bytes = self._now(), counters.loaded_pages, counters.loaded_bytes
        yield
        seconds = max(1e-9, self._now() - began)
        self._loads.append((counters.loaded_pages - pages, (counters.loaded_bytes - num_bytes) / seconds / GB))

    @contextmanager
    def of_save(self, counters: Moved) -> Iterator[None]:
        """Note what a save within adds to `counters`."""
        began, pages, num_bytes = self._now(), counters.stored_pages, counters.stored_bytes
        yield
        seconds = max(1e-9, self._now() - began)
        self._saves.append((counters.stored_pages - pages, (counters.stored_bytes - num_bytes) / seconds / GB))

    def take(self) -> Taken:
        """The calls since the last time."""
        loads, saves = _emptied(self._loads), _emptied(self._saves)
        return Taken([n for n, _ in loads], [n for n, _ in saves], [s for _, s in loads], [s for _, s in saves])


def _emptied(calls: deque[tuple[int, float]]) -> list[tuple[int, float]]:
    taken = []
    while calls:
        taken.append(calls.popleft())
    return taken
