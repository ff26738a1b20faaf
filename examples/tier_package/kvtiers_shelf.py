"""A tier of one's own: a file for each page, in a directory for one process. `pip install` it, and set shelf.path."""

from pydantic import Field

from kvstore.config.section import Section
from kvstore.config.values import Bytes, PathOrNone
from kvstore.tiers.base import TierCounters
from kvstore.tiers.kind import TierContext, TierKind, TierTraits


class ShelfConfig(Section):
    path: PathOrNone = Field(default=None, description="Directory of the files; none turns the tier off.")
    capacity_bytes: Bytes = Field(default=1 << 30, description="Most that the files may hold.")


class Shelf:
    name = "shelf"

    def __init__(self, section: ShelfConfig, context: TierContext) -> None:
        self.counters, self._directory = TierCounters(), section.path / context.place.rstrip(":")
        self.capacity_pages = max(1, section.capacity_bytes // context.layout.slot_bytes)
        self._directory.mkdir(parents=True, exist_ok=True)
        self.delete([bytes.fromhex(file.name) for file in self._directory.iterdir() if not file.is_dir()], timeout_s=0)

    def contains(self, keys, *, timeout_s):
        return [self._file(key).exists() for key in keys]

    def read_into(self, keys, views, metas, *, timeout_s):
        pages = [self._file(key).read_bytes() if self._file(key).exists() else b"" for key in keys]
        for page, view in zip(pages, views, strict=True):
            view[: len(page)] = page
        return [len(page) == meta.num_bytes for page, meta in zip(pages, metas, strict=True)]

    def write_from(self, keys, views, metas, *, evict=(), timeout_s):
        self.delete(evict, timeout_s=timeout_s)
        pages = zip(keys, views, metas, strict=True)
        return [self._file(key).write_bytes(view[: meta.num_bytes]) > 0 for key, view, meta in pages]

    def touch(self, keys, *, expires_at, timeout_s):
        return self.contains(keys, timeout_s=timeout_s)  # the store keeps the order and the deadlines

    def delete(self, keys, *, timeout_s):
        for key in keys:
            self._file(key).unlink(missing_ok=True)

    def scan(self):
        return iter(())

    def ping(self, *, timeout_s):
        self._directory.stat()

    def close(self): ...

    def _file(self, key):
        return self._directory / bytes(key).hex()


UNVERIFIED = TierTraits(is_verified=False)  # so the store checks what it reads
KIND = TierKind("shelf", ShelfConfig, Shelf, switch="path", capacity="capacity_bytes", traits=lambda _: UNVERIFIED)
