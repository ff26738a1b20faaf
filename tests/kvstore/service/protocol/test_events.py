"""News of blocks on their way to a client."""

from __future__ import annotations

import pytest

from kvstore.plan.journal import BlockEvent, Event
from kvstore.service.protocol.events import KEYS_PER_PIECE, EventsReply, encode_event, encode_events
from kvstore.service.protocol.frames import ProtocolError
from radix.hashing import BlockHash


def keys(num: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(n.to_bytes(32, "big")) for n in range(num))


def test_events_arrive_as_they_were_sent() -> None:
    events = [
        BlockEvent(Event.STORED, 12.5, "host", 1, keys(3)),
        BlockEvent(Event.REMOVED, 13.0, "disk", 0, keys(1)),
        BlockEvent(Event.CLEARED, 14.0),
        BlockEvent(Event.DROPPED, 15.0),
    ]

    raw = encode_events([piece for event in events for piece in encode_event(event)])

    assert EventsReply.read(raw).news() == events
    assert EventsReply.read(encode_events([])).news() == []


def test_an_event_of_many_keys_comes_in_pieces_that_mean_the_same() -> None:
    event = BlockEvent(Event.REMOVED, 1.0, "host", 2, keys(2 * KEYS_PER_PIECE + 1))

    pieces = encode_event(event)

    decoded = [EventsReply.read(encode_events([piece])).news() for piece in pieces]
    assert [len(one.keys) for (one,) in decoded] == [KEYS_PER_PIECE, KEYS_PER_PIECE, 1]
    assert sum((one.keys for (one,) in decoded), ()) == event.keys
    assert {(one.event, one.tier, one.group) for (one,) in decoded} == {(Event.REMOVED, "host", 2)}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_what_is_no_answer_is_refused(cut: int) -> None:
    raw = encode_events(encode_event(BlockEvent(Event.STORED, 1.0, "host", 0, keys(1))))

    with pytest.raises(ProtocolError):
        EventsReply.read(raw[:cut])
    with pytest.raises(ProtocolError, match="Invalid enum value 'BlockEaten!'"):
        EventsReply.read(raw.replace(b"BlockStored", b"BlockEaten!"))
