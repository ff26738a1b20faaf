"""A tier that keeps bytes and checks nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvstore.page import PageKey, PageMeta
from kvstore.tiers.base import StoredPage, TierCounters


class Sloppy:
    """Bytes in a dict, given back as they are."""

    name = "sloppy"
    capacity_pages = 16

    def __init__(self) -> None:
        self.counters = TierCounters()
        self.pages: dict[PageKey, bytes] = {}

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        return [key in self.pages for key in keys]

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        for key, view in zip(keys, views, strict=True):
            data = self.pages.get(key, b"")
            view[: len(data)] = data
        return self.contains(keys, timeout_s=timeout_s)

    def write_from(self, keys: Any, views: Any, metas: Any, *, evict: Any = (), timeout_s: float) -> list[bool]:
        self.delete(evict, timeout_s=timeout_s)
        for key, view, meta in zip(keys, views, metas, strict=True):
            self.pages.setdefault(key, bytes(view[: meta.num_bytes]))
        return [True] * len(keys)

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        return self.contains(keys, timeout_s=timeout_s)

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        for key in keys:
            self.pages.pop(key, None)

    def scan(self) -> Iterator[StoredPage]:
        return iter(())

    def ping(self, *, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        pass
