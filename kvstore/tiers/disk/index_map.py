"""How much address space and disk the index of a directory gets, and what is raised where that is not enough."""

from __future__ import annotations

from kvstore.errors import TierUnavailable

_INDEX_FIXED_BYTES = 64 << 20  # address space of an index without pages
_INDEX_BYTES_PER_SLOT = 4096  # ... and per slot; a page without tokens takes about 600 (100K pages, random keys)
_RESERVED_FIXED_BYTES = 1 << 20  # replaced pages stay until the next transaction
_RESERVED_BYTES_PER_SLOT = 768  # disk blocks set aside for the index, so that a full disk does not stop it
MAX_MAP_BYTES = 1 << 36  # 64 GiB of address space: 16 million slots at the figure above


class IndexMapFull(TierUnavailable):
    """The index does not fit the address space that this process has for it: not a tier that is full of pages."""

    def __init__(self, message: str, map_bytes: int) -> None:
        """`map_bytes` is what it had."""
        super().__init__(message)
        self.map_bytes = map_bytes


def map_bytes_of(num_slots: int) -> int:
    """Address space of an index of `num_slots` slots, at first."""
    return min(_INDEX_FIXED_BYTES + num_slots * _INDEX_BYTES_PER_SLOT, MAX_MAP_BYTES)


def reserved_bytes(num_slots: int) -> int:
    """Disk blocks to set aside for it."""
    return _RESERVED_FIXED_BYTES + num_slots * _RESERVED_BYTES_PER_SLOT
