"""The daemon's answers. Each is made `of` what the store says, and gives that back at the other end.

The pages of a lease travel as they are kept, in columns: a client that gets thousands of them makes three arrays.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from kvstore.plan.records import (
    CutReason,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    SaveLease,
    SlotPages,
)
from kvstore.service.protocol.frames import ProtocolError
from kvstore.service.protocol.messages import (
    MAX_LEASE_PAGES,
    MAX_OUTCOMES,
    Count,
    FrameContent,
    Number,
    OutcomePart,
    Text,
    read,
)

ByTier = Annotated[dict[Text, Count], Meta(max_length=64)]

_BLOCK, _GROUP, _SLOT = np.dtype("<i4"), np.dtype("<i2"), np.dtype("<u4")


class CallReply(FrameContent):
    """A message of the daemon. The call it answers says which one it is."""

    @classmethod
    def read(cls: type[A], raw: bytes) -> A:
        """Take an answer of this kind apart. Raises ProtocolError."""
        decoder = _decoders.get(cls)
        if decoder is None:
            decoder = _decoders[cls] = msgspec.msgpack.Decoder(cls)
        answer: A = read(decoder, raw)
        return answer


A = TypeVar("A", bound=CallReply)
_decoders: dict[type[CallReply], msgspec.msgpack.Decoder[Any]] = {}


class MatchReply(CallReply):
    """A Match."""

    num_blocks: Count
    num_tokens: Count
    pending: bool
    by_tier: ByTier
    known: Count
    cut: CutReason
    compute_wait_s: float
    without_state: Count = 0

    @staticmethod
    def of(match: Match) -> MatchReply:
        """Return the match as it is sent."""
        return MatchReply(
            match.num_blocks,
            match.num_tokens,
            match.pending,
            match.by_tier,
            match.known,
            match.cut,
            match.compute_wait_s,
            match.without_state,
        )

    def match(self) -> Match:
        """Return the match that was sent."""
        return Match(
            self.num_blocks,
            self.num_tokens,
            self.pending,
            self.by_tier,
            self.known,
            self.cut,
            self.compute_wait_s,
            self.without_state,
        )


class StatusReply(CallReply):
    """A LeaseStatus."""

    state: LeaseState
    num_blocks: Count
    num_tokens: Count

    @staticmethod
    def of(status: LeaseStatus) -> StatusReply:
        """Return the status as it is sent."""
        return StatusReply(status.state, status.num_blocks, status.num_tokens)

    def status(self) -> LeaseStatus:
        """Return the status that was sent."""
        return LeaseStatus(self.state, self.num_blocks, self.num_tokens)


class PageColumns(FrameContent):
    """The pages of a lease: their blocks, groups and slots, each as one run of little-endian numbers."""

    blocks: Annotated[bytes, Meta(max_length=MAX_LEASE_PAGES * _BLOCK.itemsize)]
    groups: Annotated[bytes, Meta(max_length=MAX_LEASE_PAGES * _GROUP.itemsize)]
    slots: Annotated[bytes, Meta(max_length=MAX_LEASE_PAGES * _SLOT.itemsize)]

    @staticmethod
    def of(pages: SlotPages) -> PageColumns:
        """Return the pages as they are sent."""
        return PageColumns(
            pages.blocks.astype(_BLOCK).tobytes(),
            pages.groups.astype(_GROUP).tobytes(),
            pages.slots.astype(_SLOT).tobytes(),
        )

    def pages(self, slot_base: int) -> SlotPages:
        """Return the pages that were sent. slot_base: added to slots, so that those of different slabs differ.

        Raises ProtocolError where the columns are not equally long.
        """
        num_pages, rest = divmod(len(self.slots), _SLOT.itemsize)
        if rest or (len(self.blocks), len(self.groups)) != (num_pages * _BLOCK.itemsize, num_pages * _GROUP.itemsize):
            raise ProtocolError("the blocks, groups and slots of a lease are not equally many")
        slots = np.frombuffer(self.slots, _SLOT).astype(np.int64)
        if slot_base:  # a first addition after a call has waited takes 12 us, more than all the rest; most have none
            slots += slot_base
        return SlotPages(np.frombuffer(self.blocks, _BLOCK), np.frombuffer(self.groups, _GROUP), slots)


class LoadReply(CallReply):
    """A LoadLease and its status."""

    num_blocks: Count
    num_tokens: Count
    by_tier: ByTier
    pages: PageColumns
    status: StatusReply

    @staticmethod
    def of(lease: LoadLease, status: LeaseStatus) -> LoadReply:
        """Return the lease as it is sent."""
        pages = PageColumns.of(lease.pages)
        return LoadReply(lease.num_blocks, lease.num_tokens, lease.by_tier, pages, StatusReply.of(status))

    def lease(self, lease_id: int, slot_base: int) -> LoadLease:
        """Return the lease that was granted under a number of the client's."""
        return LoadLease(lease_id, self.num_blocks, self.num_tokens, self.pages.pages(slot_base), self.by_tier)


class SaveReply(CallReply):
    """A SaveLease."""

    pages: PageColumns
    skipped: Count

    @staticmethod
    def of(lease: SaveLease) -> SaveReply:
        """Return the lease as it is sent."""
        return SaveReply(PageColumns.of(lease.pages), lease.skipped)

    def lease(self, lease_id: int, slot_base: int) -> SaveLease:
        """Return the lease that was granted under a number of the client's."""
        return SaveLease(lease_id, self.pages.pages(slot_base), self.skipped)


class NumberReply(CallReply):
    """A ticket, or how many blocks or leases a call was about."""

    number: Number


class OutcomesReply(CallReply):
    """What became of the actions of a hint, in their order."""

    outcomes: Annotated[list[OutcomePart], Meta(max_length=MAX_OUTCOMES)]


Counts = dict[str, int]


class FlushReply(CallReply):
    """A FlushResult."""

    ok: bool
    written: Counts
    missing: dict[str, Counts]
    undeleted: dict[str, Counts]

    @staticmethod
    def of(result: FlushResult) -> FlushReply:
        """Return the result as it is sent."""
        return FlushReply(result.ok, result.written, result.missing, result.undeleted)

    def result(self) -> FlushResult:
        """Return the result that was sent."""
        return FlushResult(self.ok, self.written, self.missing, self.undeleted)


class StatsReply(CallReply):
    """Counters and gauges."""

    values: dict[str, Any]
