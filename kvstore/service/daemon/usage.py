"""The use of one client since it attached, for the dashboard."""

from __future__ import annotations

import time
from collections import OrderedDict

from kvstore.clock import SYSTEM_CLOCK
from kvstore.layout import Layout
from kvstore.plan.records import LoadLease, Request, SaveLease

MAX_REQUESTS = 4096  # whose lookups are counted once, however often they are repeated


def unix_of(steady: float) -> float:
    """Unix time of a moment of the steady clock. Made when it is shown: the wall clock may have been set since."""
    return SYSTEM_CLOCK.wall() - (SYSTEM_CLOCK.steady() - steady)


class Usage:
    """Counts of one client. The daemon's event loop only.

    attached_at, seen_at: Unix time of its greeting and of the last lookup or end of a lease, by the wall clock of now.
    """

    def __init__(self) -> None:
        self._attached = self._seen = time.monotonic()
        self.lookups = 0
        self.prompt_tokens = 0
        self.hit_tokens = 0
        self.saved_bytes = 0
        self._counted: OrderedDict[int, int] = OrderedDict()  # request id -> prompt length then

    @property
    def attached_at(self) -> float:
        return unix_of(self._attached)

    @property
    def seen_at(self) -> float:
        return unix_of(self._seen)

    def looked_up(self, request: Request) -> None:
        """A prompt was asked about; asking again, with no more tokens, is the same lookup."""
        self._seen = time.monotonic()
        before = self._counted.get(request.id)
        if before == request.num_tokens:
            return
        self.lookups += 1
        self.prompt_tokens += request.num_tokens
        self._counted[request.id] = request.num_tokens
        if len(self._counted) > MAX_REQUESTS:
            self._counted.popitem(last=False)

    def completed(self, lease: LoadLease | SaveLease, layout: Layout) -> None:
        """A lease ended well."""
        self._seen = time.monotonic()
        if isinstance(lease, LoadLease):
            self.hit_tokens += sum(lease.by_tier.values()) * layout.block_size
        else:
            self.saved_bytes += len(lease.pages) * layout.slot_bytes
