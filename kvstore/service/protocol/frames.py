"""Frames between a client and the daemon, over its unix socket.

A frame is a header of 16 bytes and a body:

    magic u16 | version u8 | kind u8 | status u8 | 3 zero bytes | body length u32 | sequence u32      little endian

A client has one call under way per connection; the answer repeats kind and sequence. Calls are structs of `messages`,
their answers of `answers`. The first frame of a connection and errors are JSON, and they and this header stay as they
are in every version of the protocol, so that two releases that cannot work together can tell each other why.

Nothing is ever unpickled, and every length is checked against a bound before memory is taken for it.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from kvstore.errors import KVStoreError

MAGIC = 0x564B  # "KV"
VERSION = 2  # 1: until November 2026, calls were packed by hand
MAX_BODY_BYTES = 8 << 20  # keys of long prompts come in pieces (messages.PIECE_KEYS)

HEADER = struct.Struct("<HBBB3xII")


class Kind(IntEnum):
    """What a frame is about."""

    HELLO = 1  # JSON: layout, namespace -> JSON: session, slab; with the slab's descriptor
    ATTACH = 2  # JSON: session -> another connection of it
    CALL = 3  # a Call -> an Answer, or nothing (messages.py)


class ReplyStatus(IntEnum):
    """How an answer is meant."""

    OK = 0
    RESEND = 1  # the daemon does not know the request as the client thinks: send all keys
    ERROR = 2  # JSON: type, message; the client raises it
    GONE = 3  # the session is not known (any more): say hello again


class ProtocolError(KVStoreError):
    """The other side sent what this protocol does not have; the connection is closed."""


class OtherVersion(ProtocolError):
    """The other side is of a release that speaks another version of the protocol."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the other side speaks version {version} of the protocol between daemon and client, this one {VERSION}: "
            "install the same release of kvtiers for both"
        )
        self.version = version


class Frame(NamedTuple):
    """A header, taken apart."""

    kind: Kind
    status: ReplyStatus
    num_bytes: int
    sequence: int


def encode_frame(
    kind: Kind,
    body: bytes | bytearray = b"",
    sequence: int = 0,
    status: ReplyStatus = ReplyStatus.OK,
    *,
    version: int = VERSION,
) -> bytes:
    """A frame with its body. version: of the other side, where it is to read that it cannot be served."""
    return HEADER.pack(MAGIC, version, kind, status, len(body), sequence) + body


def decode_header(raw: bytes | bytearray | memoryview) -> Frame:
    """Parse 16 bytes. Raises ProtocolError for what is no header of this version, or announces too much."""
    magic, version, kind, status, num_bytes, sequence = HEADER.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {magic:#06x}, not {MAGIC:#06x}: this is no kvstore client")
    if version != VERSION:
        raise OtherVersion(version)
    if num_bytes > MAX_BODY_BYTES:
        raise ProtocolError(f"frame announces {num_bytes} bytes, more than is allowed")
    try:
        return Frame(Kind(kind), ReplyStatus(status), num_bytes, sequence)
    except ValueError:
        raise ProtocolError(f"frame has kind {kind} and status {status}, which this release does not know") from None


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
