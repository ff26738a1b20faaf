"""News of blocks as a daemon's client gets them.

Parents stay behind: who asks here has the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from kvstore.plan.journal import BlockEvent, Event
from kvstore.service.protocol.messages import Count, FrameContent, Key, Text, encode
from kvstore.service.protocol.replies import CallReply

KEYS_PER_PIECE = 4096  # an event of a million keys is sent in pieces, so that answers and queues have a bound


class EventPiece(FrameContent):
    """An event, or a piece of one: pieces mean what the whole does. at: Unix time."""

    event: Event
    at: float
    tier: Text
    group: Count
    keys: Annotated[list[Key], Meta(max_length=KEYS_PER_PIECE)]


class EventsReply(CallReply):
    """Any number of events, oldest first."""

    events: list[EventPiece]

    def news(self) -> list[BlockEvent]:
        """Return the events that were sent."""
        return [BlockEvent(one.event, one.at, one.tier, one.group, tuple(one.keys)) for one in self.events]


class _Pieces(FrameContent):
    """An EventsReply of pieces that are written down already."""

    events: list[msgspec.Raw]


def encode_event(event: BlockEvent) -> list[bytes]:
    """Write an event down, in pieces that mean the same."""
    starts = range(0, max(1, len(event.keys)), KEYS_PER_PIECE)
    pieces = [list(event.keys[start : start + KEYS_PER_PIECE]) for start in starts]
    return [encode(EventPiece(event.event, event.at, event.tier, event.group, keys)) for keys in pieces]


def encode_events(pieces: Sequence[bytes]) -> bytes:
    """Write an answer down, of pieces of events."""
    return encode(_Pieces([msgspec.Raw(piece) for piece in pieces]))
