"""News of blocks as a daemon's client gets them: one answer is any number of events, one behind the other.

Parents stay behind: who asks here has the prompts.
"""

from __future__ import annotations

import struct

from kvstore.plan.journal import BlockEvent, Event
from kvstore.service.protocol.frames import ProtocolError, Reader
from kvstore.service.protocol.messages import KEY_BYTES
from radix.hashing import BlockHash

KEYS_PER_PIECE = 4096  # an event of a million keys is sent in pieces, so that answers and queues have a bound

_EVENT = struct.Struct("<BBHId")  # event, bytes of the tier's name, group, keys, Unix time

EVENTS = tuple(Event)


def encode_event(event: BlockEvent) -> list[bytes]:
    """The event, in pieces that mean the same."""
    tier = event.tier.encode()
    starts = range(0, max(1, len(event.keys)), KEYS_PER_PIECE)
    pieces = [event.keys[start : start + KEYS_PER_PIECE] for start in starts]
    return [
        _EVENT.pack(EVENTS.index(event.event), len(tier), event.group, len(keys), event.at) + tier + b"".join(keys)
        for keys in pieces
    ]


def decode_events(raw: bytes) -> list[BlockEvent]:
    """The events of an answer. Raises ProtocolError."""
    reader, events = Reader(raw), []
    while not reader.is_at_end:
        kind, num_tier, group, num_keys, at = reader.unpack(_EVENT)
        if kind >= len(EVENTS):
            raise ProtocolError(f"event has number {kind} where only {len(EVENTS)} are known")
        tier, keys = reader.text(num_tier), reader.take(num_keys * KEY_BYTES)
        split = [BlockHash(keys[start : start + KEY_BYTES]) for start in range(0, len(keys), KEY_BYTES)]
        events.append(BlockEvent(EVENTS[kind], at, tier, group, tuple(split)))
    return events
