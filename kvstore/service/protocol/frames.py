"""Frames between a client and the daemon, over its unix socket.

A frame is a header of 16 bytes and a body:

    magic u16 | version u8 | op u8 | status u8 | 3 zero bytes | body length u32 | sequence u32      little endian

A client has one call under way per connection; the answer repeats op and sequence. What bodies say is in `messages`:
hot ones are packed structs, rare ones JSON. Nothing is ever unpickled, and every length is checked against a bound
before memory is taken for it.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from kvstore.errors import KVStoreError

MAGIC = 0x564B  # "KV"
VERSION = 1
MAX_BODY_BYTES = 8 << 20  # keys of long prompts come in pieces (messages.PIECE_KEYS)
MAX_TEXT_BYTES = 4096  # options, owners and reasons

HEADER = struct.Struct("<HBBB3xII")


class Verb(IntEnum):
    """The verb of a frame."""

    HELLO = 1  # JSON: layout, namespace -> JSON: session, slab; with the slab's descriptor
    ATTACH = 2  # JSON: session -> another connection of it
    LOOKUP = 3
    PREPARE_LOAD = 4
    WAIT = 5
    PREPARE_SAVE = 6
    COMPLETE = 7
    RELEASE = 8
    RELEASE_OWNER = 9
    PREFETCH = 10
    CANCEL = 11
    FINISHED = 12
    PIN = 13
    UNPIN = 14
    FORGET = 15
    OBSERVE_PREFILL = 16
    FLUSH = 17
    STATS = 18
    PEEK = 21  # as LOOKUP
    EVENTS = 22  # what came and went since the last answer, waited for (events.py)
    KEYS = 23  # keys of a request that is too long for one message, before the call about it


class ReplyStatus(IntEnum):
    """How an answer is meant."""

    OK = 0
    RESEND = 1  # the daemon does not know the request as the client thinks: send all keys
    ERROR = 2  # JSON: type, message; the client raises it
    GONE = 3  # the session is not known (any more): say hello again


class ProtocolError(KVStoreError):
    """The other side sent what this protocol does not have; the connection is closed."""


class Frame(NamedTuple):
    """A header, taken apart."""

    op: Verb
    status: ReplyStatus
    num_bytes: int
    sequence: int


def encode_frame(
    op: Verb, body: bytes | bytearray = b"", sequence: int = 0, status: ReplyStatus = ReplyStatus.OK
) -> bytes:
    """A frame with its body."""
    return HEADER.pack(MAGIC, VERSION, op, status, len(body), sequence) + body


def decode_header(raw: bytes | bytearray | memoryview) -> Frame:
    """Parse 16 bytes. Raises ProtocolError for what is no header of this version, or announces too much."""
    magic, version, op, status, num_bytes, sequence = HEADER.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {magic:#06x}, not {MAGIC:#06x}: this is no kvstore client")
    if version != VERSION:
        raise ProtocolError(f"frame has protocol version {version}; this release speaks {VERSION}")
    if num_bytes > MAX_BODY_BYTES:
        raise ProtocolError(f"frame announces {num_bytes} bytes, more than is allowed")
    try:
        return Frame(Verb(op), ReplyStatus(status), num_bytes, sequence)
    except ValueError:
        raise ProtocolError(f"frame has op {op} and status {status}, which this release does not know") from None


class Reader:
    """Takes a body apart, front to back. Raises ProtocolError where it is too short, or too long at the end."""

    __slots__ = ("_at", "_raw")

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        """The next fields."""
        end = self._at + form.size
        if end > len(self._raw):
            raise ProtocolError(f"message of {len(self._raw)} bytes ends within a field of {form.size} at {self._at}")
        fields = form.unpack_from(self._raw, self._at)
        self._at = end
        return fields

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        end = self._at + num_bytes
        if num_bytes < 0 or end > len(self._raw):
            raise ProtocolError(f"message of {len(self._raw)} bytes ends within a field of {num_bytes} at {self._at}")
        data = self._raw[self._at : end]
        self._at = end
        return data

    def text(self, num_bytes: int) -> str:
        """The next bytes as text."""
        if num_bytes > MAX_TEXT_BYTES:
            raise ProtocolError(f"text of {num_bytes} bytes; at most {MAX_TEXT_BYTES} are allowed")
        try:
            return self.take(num_bytes).decode()
        except UnicodeDecodeError:
            raise ProtocolError("text is not UTF-8") from None

    @property
    def is_at_end(self) -> bool:
        """True if nothing is left."""
        return self._at == len(self._raw)

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._raw):
            raise ProtocolError(f"message has {len(self._raw) - self._at} bytes too many")


def decode_json(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises ProtocolError for anything else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise ProtocolError("message is not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"message is a JSON {type(value).__name__}; it must be an object")
    return value


def encode_json(value: object) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def encode_error(error: KVStoreError) -> bytes:
    """An error on its way to the client that caused it."""
    return encode_json({"type": type(error).__name__, "message": str(error)})
