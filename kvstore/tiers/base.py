"""A tier is a place for bytes: blocking, batched, with no bookkeeping.

The planner knows what lies where; a tier only moves pages between slots of the host slab and its medium, and
verifies what it reads. It is called from the threads of one lane (several at once, so a tier is thread-safe) and
never under the store's lock. Single pages fail by a False in the answer, a kind of call that the medium refuses by
TierRefused, and the whole medium by TierUnavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvstore.direction import Direction
from kvstore.page import PageKey, PageMeta


@dataclass(frozen=True, slots=True)
class StoredPage:
    """One page found by `scan`."""

    key: PageKey
    meta: PageMeta


@dataclass(slots=True)
class TierCounters:
    """The counters that only the tier itself has. Plain integers, read without a lock by metrics."""

    corrupt_pages: int = 0
    collisions: int = 0
    expired_pages: int = 0
    lost_pages: int = 0
    fallback_evictions: int = 0
    extra: dict[str, int] = field(default_factory=dict)


class Tier(Protocol):
    """A tier: a place for pages below host memory.

    All I/O methods take `timeout_s`, the time left for the whole batch: where the medium allows it (sockets) it is
    enforced and TierUnavailable raised. `views[i]` is a whole slot, `layout.slot_bytes` long and aligned to 4096
    bytes; of it `metas[i].num_bytes` carry data. The tier keeps no reference to a view after it returns.
    """

    name: str
    counters: TierCounters

    @property
    def capacity_pages(self) -> int | None:
        """Pages that fit; None where the medium evicts by itself (Redis)."""

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        """Which keys are there, unexpired, without reading pages. One round trip for the whole sequence."""

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        """Fill `views[i]` with the page of `keys[i]`; False where it is gone, expired, corrupt or of another length.

        Verified before True is returned: key, length, checksum, expiry and, if `metas[i].tokens` is not empty,
        tokens. A corrupt copy is dropped from the tier and counted. A False entry leaves its view undefined.
        """

    def write_from(
        self,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        *,
        evict: Sequence[PageKey] = (),
        timeout_s: float,
    ) -> list[bool]:
        """Store pages and publish those that are whole; False where there was no room or the write failed.

        `evict` leave first, in the same transaction where the medium has one. A key that is already there keeps its
        bytes (first writer wins) and answers True. A page is visible to readers either whole or not at all, also
        after a crash.
        """

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        """Refresh recency and, where `expires_at` (Unix time) is not 0, the deadline; False where the page is gone."""

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        """Forget pages; unknown keys are ignored."""

    def scan(self) -> Iterator[StoredPage]:
        """Yield what is stored, least recently used first. A medium that cannot be walked cheaply yields nothing."""

    def ping(self, *, timeout_s: float) -> None:
        """Return if the medium answers, else raise TierUnavailable. A breaker asks this before it closes."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


@runtime_checkable
class Probing(Protocol):
    """A tier that can test one direction without a page: what a ping says of reads may not hold for writes."""

    def probe(self, way: Direction, *, timeout_s: float) -> None:
        """Return if this kind of call would be done now. Raises TierRefused or TierUnavailable.

        Leaves nothing behind, or what ends by itself within seconds.
        """


CLEARED = "cleared_keys"  # in `TierCounters.extra` of a Sweepable: what its sweeps have deleted


@runtime_checkable
class Sweepable(Protocol):
    """A tier of pages that nobody has an index of, which can delete them all."""

    def sweep(self, *, timeout_s: float) -> int:
        """Delete every page of this tier's namespace, whoever wrote it; returns how many keys. Takes long.

        Raises TierUnavailable if the medium is not reached, or the time runs out; what was deleted is deleted.
        """


@runtime_checkable
class Selective(Protocol):
    """A tier that never has room for some pages, and tells it by their names.

    has_room_for: False for pages that are not to be sent; None if there are none.
    """

    has_room_for: Callable[[PageKey], bool] | None


@runtime_checkable
class Claimable(Protocol):
    """A tier where machines tell each other which blocks they are computing.

    A claim is a key with a short life beside a page that is not there yet. It only makes others wait, so it may be lost
    at any time.
    """

    def claim(self, keys: Sequence[PageKey], *, token: bytes, lease_s: float, timeout_s: float) -> list[bool]:
        """Claim pages for `token`, or renew that; False where another has claimed one. All False if the first is taken.

        The claims end by themselves after `lease_s`. Raises TierError if the medium takes no claims, TierUnavailable if
        it cannot be reached.
        """

    def unclaim(self, keys: Sequence[PageKey], *, token: bytes, timeout_s: float) -> None:
        """End those claims that are `token`'s."""
