"""A log of KV events of vLLM or SGLang, as `kvstore record-events` writes it, and the requests that it lets one guess.

The file is JSON lines. First a header, {"format": "kve1", "endpoint": ...}; then a message a line: `at` (Unix time at
which it came), `topic` (text), `seq` (its number) and `b` (the payload's msgpack bytes, base64), as they were on the
wire: frames of topic, eight bytes big-endian and a batch [ts, events, data_parallel_rank].

An engine publishes what it stores and removes, not what it is asked. So a request here is a chain of blocks that were
stored together with all that it hangs on: prompt and answer in one, for answers are stored too. A chain that goes on
growing within seconds is the same request. A prompt that is there as a whole stores nothing and is not seen; its hits
are missing in any rate that is replayed from here: rates are of those requests alone that had something to compute.
A gap in the numbers is told.

Token ids and salts go over the wire in clear; `stripped` leaves them out before anything is written.
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import DecodeError, msgpack

from kvstore.lab.traces.source import Format, Source, why
from kvstore.load.kvt import MAX_PROMPT_TOKENS, MAX_TIME_S, KvtRequest

FORMAT = "kve1"
MEDIA = (None, "GPU", "gpu")  # where an engine computes; what is stored elsewhere is a copy
KEPT = ("type", "block_hashes", "parent_block_hash", "block_size", "medium", "group_idx")
TOKEN_IDS = 3  # place in an event that is an array
ARRAY_FIELDS = 7  # of which the others have salts and names
GROWS_WITHIN_S = 2.0  # a block of 16 tokens of an answer; a session's next turn comes later, mostly


def stripped(payload: bytes) -> bytes:
    """Return a batch without token ids, salts and names. Raises ValueError if it is no batch."""
    batch = _batch(payload)
    events: list[Any] = []
    for event in batch[1]:
        if isinstance(event, dict):
            events.append({name: event[name] for name in KEPT if name in event})
        elif isinstance(event, list):
            short = event[:ARRAY_FIELDS]
            events.append([[] if at == TOKEN_IDS else value for at, value in enumerate(short)])
        else:
            raise ValueError("an event is a map")
    return msgpack.encode([batch[0], events, *batch[2:3]])


def _batch(payload: bytes) -> list[Any]:
    try:
        batch = msgpack.decode(payload)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no msgpack: {error}") from None
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise ValueError("a batch is [ts, events, data_parallel_rank]")
    return batch


@dataclass(slots=True)
class _Chain:
    """A request that may still grow. path: numbers of its blocks, root first."""

    at: float
    last_at: float
    path: list[int]


class _Log:
    """The requests of one log."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._numbers: dict[Any, int] = {}  # of a block, by its name and the data-parallel rank
        self._above: list[int] = []  # the block that each one continues, -1 for none
        self._chains: list[_Chain] = []
        self._growing: dict[int, _Chain] = {}  # by their last block
        self._seq: dict[str, int] = {}
        self._counts = dict.fromkeys(_NOTES, 0)

    def requests(self) -> Iterator[KvtRequest]:
        source = self._source
        for line, fields in source.objects():
            self._line(line, fields)
        source.notes += [f"{count} {_NOTES[name]}" for name, count in self._counts.items() if count]
        source.notes.append("an event log shows what was stored, not what was hit: whole hits are not in it")
        for chain in self._chains:
            num_tokens = len(chain.path) * source.block_tokens
            yield KvtRequest(chain.at, -1, -1, num_tokens, 0, tuple(chain.path))

    def _line(self, line: str, fields: Mapping[str, Any]) -> None:
        try:
            if "format" not in fields:
                self._message(fields)
            elif fields["format"] != FORMAT:
                raise ValueError(f"a {FORMAT} header")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._source.bad(f"a message ({why(error)})", line)

    def _message(self, fields: Mapping[str, Any]) -> None:
        topic, seq = fields["topic"], fields["seq"]
        if not isinstance(topic, str) or type(seq) is not int:
            raise ValueError("topic must be text, seq a number")
        at, events, *ranks = _batch(b64decode(fields["b"], validate=True))
        if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at) or abs(at) > MAX_TIME_S:
            raise ValueError(f"ts is {at!r:.40}; it must be seconds")
        rank = ranks[0] if ranks and isinstance(ranks[0], int) else 0
        self._count(topic, seq)
        for event in events:
            is_stored = _field(event, "type", 0) == "BlockStored"
            if is_stored and _field(event, "medium", 6) in MEDIA and not _field(event, "group_idx", ARRAY_FIELDS):
                self._stored(at, rank, event)

    def _count(self, topic: str, seq: int) -> None:
        last = self._seq.get(topic)
        if last is not None and seq <= last:
            self._counts["restarts"] += 1
        elif last is not None:
            self._counts["missing"] += seq - last - 1
        self._seq[topic] = seq

    def _stored(self, at: float, rank: int, event: Any) -> None:
        hashes, parent = _field(event, "block_hashes", 1), _field(event, "parent_block_hash", 2)
        size = _field(event, "block_size", 4)
        if type(size) is not int or not 1 <= size <= MAX_PROMPT_TOKENS:
            raise ValueError(f"block_size is {size!r:.40}; it must be a number of tokens")
        if not isinstance(hashes, list) or not hashes or not all(isinstance(one, (int, bytes)) for one in hashes):
            raise ValueError("block_hashes must be a list of numbers or bytes")
        if parent is not None and not isinstance(parent, (int, bytes)):
            raise ValueError("parent_block_hash must be a number or bytes")
        self._source.block_tokens = self._source.block_tokens or size
        if size != self._source.block_tokens:
            self._counts["others"] += 1
            return
        above = -1
        if parent is not None:
            self._counts["orphans"] += (rank, parent) not in self._numbers
            above = self._number(rank, parent, -1)
        chain = self._growing.pop(above, None)
        if chain is None or at - chain.last_at > GROWS_WITHIN_S:
            chain = _Chain(at, at, self._path(above))
            self._chains.append(chain)
        for name in hashes:
            above = self._number(rank, name, above)
            chain.path.append(above)
        chain.last_at = at
        self._growing[above] = chain

    def _path(self, block: int) -> list[int]:
        path: list[int] = []
        while block >= 0:
            path.append(block)
            block = self._above[block]
        return path[::-1]

    def _number(self, rank: int, name: int | bytes, above: int) -> int:
        """The number of a block. A hash names all before it, so where it was first seen is where it is."""
        number = self._numbers.setdefault((rank, name), len(self._above))
        if number == len(self._above):
            self._above.append(above)  # a block with a smaller number, so there is no circle
        return number


_NOTES = {
    "missing": "messages are missing in the numbers of the log",
    "restarts": "times the numbers begin anew: a publisher was started again",
    "orphans": "chains hang on blocks that were stored before the log began",
    "others": "events have another block size and are left out",
}


def _field(event: Any, name: str, place: int) -> Any:
    """A field of an event, which is a map (vLLM 0.32), or an array with its type first."""
    if isinstance(event, dict):
        return event.get(name)
    if isinstance(event, list):
        return event[place] if place < len(event) else None
    raise ValueError("an event is a map")


def _read(source: Source) -> Iterator[KvtRequest]:
    return _Log(source).requests()


EVENT_LOG = Format(
    "events",
    "what kvstore record-events writes",
    lambda fields: fields.get("format") == FORMAT,
    _read,
    0,
    window_s=60.0,  # of several ranks
    may_be_cut=True,
)
