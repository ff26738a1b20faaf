"""The disk tier's meta table: what a directory is made for, and the counters of its slots.

    "geometry"  layout, bytes per slot and format version, as JSON; only the version ever changes
    "state"     the allocator's counters (slots.py); read, and written back, by every write transaction

Both have a checksum of their own. Inside the caller's transaction; called by DiskIndex only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from kvstore.errors import LayoutMismatch
from kvstore.tiers.disk.record import decode_checked, encode_checked
from kvstore.tiers.disk.slots import AllocatorState, Txn

DISK_FORMAT_VERSION = 2
# The same records. But builds that write this number keep LMDB's table of readers and know of no other: beside them
# pages of the index are written over while somebody reads them.
LMDB_LOCKS_VERSION = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """The layout of a directory; pages of another one are never put into it."""

    layout: str
    slot_bytes: int
    version: int = DISK_FORMAT_VERSION


class MetaTable:
    """The two values of one directory."""

    def __init__(self, meta: Any) -> None:
        """Take the handle of the table."""
        self._meta = meta

    def geometry(self, txn: Txn) -> Geometry | None:
        """The directory's layout; None if it is new. Raises CorruptPage or LayoutMismatch (other version)."""
        raw = txn.get(b"geometry", db=self._meta)
        if raw is None:
            return None
        fields = json.loads(decode_checked(raw))
        if fields["version"] not in (DISK_FORMAT_VERSION, LMDB_LOCKS_VERSION):
            raise LayoutMismatch(
                f"disk directory has format version {fields['version']}; this release reads {DISK_FORMAT_VERSION}"
            )
        return Geometry(fields["layout"], fields["slot_bytes"], fields["version"])

    def set_geometry(self, txn: Txn, geometry: Geometry) -> None:
        """Write what the directory is made for."""
        txn.put(b"geometry", encode_checked(json.dumps(asdict(geometry)).encode()), db=self._meta)

    def state(self, txn: Txn) -> AllocatorState:
        """The counters as they stand. Raises CorruptPage."""
        raw = txn.get(b"state", db=self._meta)
        return AllocatorState() if raw is None else AllocatorState.decode(raw)

    def set_state(self, txn: Txn, encoded: bytes) -> None:
        """Write the counters back, in their stored form."""
        txn.put(b"state", encoded, db=self._meta)
