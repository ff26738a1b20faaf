"""The content of frames: requests, calls about them, and answers.

A message about a request names it by a number of the client's, and brings only the keys that the daemon has not seen:
`base` says how many the client believes are there. A daemon that knows another number answers RESEND, and the
message comes again with all keys. So the daemon may forget, restart or be another one, and nothing is out of step.
Where there are more than PIECE_KEYS to bring, messages of Op.KEYS bring all but the last of them before.

Leases are numbered by the client, too: a call whose answer never came can still be undone.

`encode_x` makes what `read_x` or `decode_x` on the other side takes apart; those raise ProtocolError for anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.errors import RequestError
from kvstore.plan.records import (
    CutReason,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
    SlotPage,
)
from kvstore.requests import check_options
from kvstore.service.protocol.frames import (
    MAX_BODY_BYTES,
    MAX_TEXT_BYTES,
    ProtocolError,
    Reader,
    decode_json,
    encode_json,
)
from radix.hashing import BlockHash

KEY_BYTES = 32
MAX_KEYS = 1 << 20  # of a request, 16 million tokens in blocks of 16; each takes some 75 bytes in the daemon
PIECE_KEYS = 1 << 14  # in one message
MAX_TIMEOUT_S = 600.0

STAGING = 1 << 31  # first number of a slot of staging (`service.isolate`); a slab has fewer slots

_REQUEST = struct.Struct("<QIIQII")  # id, base, new keys, num_tokens, blocks held, bytes of options
_LOOKUP = struct.Struct("<f")  # timeout
_PREPARE = struct.Struct("<QIII")  # lease id, first, end, bytes of the owner
_LEASE = struct.Struct("<Q")
_WAIT = struct.Struct("<Qf")
_COMPLETE = struct.Struct("<QI")  # lease id, 1 + number of flags; 0 means all
_MATCH = struct.Struct("<IIIBBBf")  # blocks, tokens, known, pending, cut, tiers, seconds waited for computing
_LOAD = struct.Struct("<IIBIIBI")  # blocks, tokens, state, usable blocks, usable tokens, tiers, pages
_SAVE = struct.Struct("<II")  # skipped, pages
_STATUS = struct.Struct("<BII")
_PAGE = struct.Struct("<IHI")
_TIER = struct.Struct("<BI")
_NUMBER = struct.Struct("<q")
_SECONDS = struct.Struct("<d")
_PREFILL = struct.Struct("<qd")

MAX_LEASE_PAGES = (MAX_BODY_BYTES - 4096) // _PAGE.size  # that an answer can tell

CUTS = tuple(CutReason)
STATES = tuple(LeaseState)


# ---- requests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestPart:
    """The request part of a message (see Request). options: None where they were sent before."""

    id: int
    base: int
    keys: list[BlockHash]
    num_tokens: int
    held: int
    options: RequestOptions | None


def encode_request(request: Request, base: int, end: int) -> bytes:
    """The request, with its keys [base, end)."""
    options = _encode_options(request.options) if base == 0 else b""
    keys = request.keys[base:end]
    head = _REQUEST.pack(request.id, base, len(keys), request.num_tokens, request.held, len(options))
    return head + options + b"".join(keys)


def read_request(reader: Reader) -> RequestPart:
    """The request of a message."""
    request_id, base, num_keys, num_tokens, held, num_options = reader.unpack(_REQUEST)
    if base + num_keys > MAX_KEYS:
        raise too_long(base + num_keys)
    options = _decode_options(reader.text(num_options)) if base == 0 else None
    raw = reader.take(num_keys * KEY_BYTES)
    keys = [BlockHash(raw[at : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]
    return RequestPart(request_id, base, keys, num_tokens, held, options)


def too_long(num_keys: int) -> RequestError:
    """The answer to a request with too many blocks, by the client itself if it is asked."""
    return RequestError(f"request has {num_keys} blocks; a daemon takes at most {MAX_KEYS}")


def _encode_options(options: RequestOptions) -> bytes:
    # The tenant stays here: it is part of the keys already.
    fields = {
        "session": options.session,
        "priority": options.priority,
        "ttl_s": options.ttl_s,
        "retain_until": options.retain_until,
        "pin": options.pin,
        "single_flight": options.single_flight,
        "step_blocks": options.step_blocks,
        "whole": options.whole,
    }
    usual = RequestOptions()
    said = {name: value for name, value in fields.items() if value != getattr(usual, name)}
    raw = encode_json(said) if said else b""
    if len(raw) > MAX_TEXT_BYTES:
        raise RequestError(f"options have {len(raw)} bytes as JSON; at most {MAX_TEXT_BYTES} are allowed")
    return raw


_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "session": (str,),
    "priority": (int,),
    "ttl_s": (int, float),
    "retain_until": (int, float),
    "pin": (bool,),
    "single_flight": (bool,),
    "step_blocks": (int,),
    "whole": (bool,),
}


def options_from_json(fields: dict[str, Any]) -> RequestOptions:
    """Options as they stand in JSON. Raises RequestError naming the field."""
    for name, value in fields.items():
        kinds = _OPTION_TYPES.get(name)
        if kinds is None:
            raise RequestError(f"options.{name:.64} is not known; known are {', '.join(_OPTION_TYPES)}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise RequestError(f"options.{name:.64} is {value!r:.80}; it must be of type {kinds[-1].__name__}")
    options = RequestOptions(**fields)
    check_options(options)
    return options


def _decode_options(text: str) -> RequestOptions:
    return options_from_json(decode_json(text.encode())) if text else RequestOptions()


# ---- calls, as the client makes them and the daemon reads them ------------------------------------------------------


def encode_lookup(request: bytes, timeout_s: float) -> bytes:
    return _LOOKUP.pack(timeout_s) + request


def read_timeout(reader: Reader) -> float:
    (timeout_s,) = reader.unpack(_LOOKUP)
    return check_timeout(timeout_s)


def check_timeout(timeout_s: float) -> float:
    """A wait the daemon is willing to do."""
    if not 0 <= timeout_s <= MAX_TIMEOUT_S:
        raise ProtocolError(f"timeout is {timeout_s} s; it must be in [0, {MAX_TIMEOUT_S}]")
    return float(timeout_s)


def bounded(timeout_s: float) -> float:
    """The wait that comes nearest to what a caller asks for."""
    return min(max(0.0, timeout_s), MAX_TIMEOUT_S)


def encode_prepare(request: bytes, lease_id: int, first: int, end: int, owner: str) -> bytes:
    raw = owner.encode()
    return _PREPARE.pack(lease_id, first, end, len(raw)) + raw + request


def read_prepare(reader: Reader) -> tuple[int, int, int, str]:
    """Lease id, blocks [first, end), owner."""
    lease_id, first, end, num_owner = reader.unpack(_PREPARE)
    return lease_id, first, end, reader.text(num_owner)


def encode_lease(lease_id: int) -> bytes:
    return _LEASE.pack(lease_id)


def read_lease(reader: Reader) -> int:
    (lease_id,) = reader.unpack(_LEASE)
    return int(lease_id)


def encode_wait(lease_id: int, timeout_s: float) -> bytes:
    return _WAIT.pack(lease_id, timeout_s)


def read_wait(reader: Reader) -> tuple[int, float]:
    lease_id, timeout_s = reader.unpack(_WAIT)
    return lease_id, check_timeout(timeout_s)


def encode_complete(lease_id: int, filled: Sequence[bool] | None) -> bytes:
    if filled is None:
        return _COMPLETE.pack(lease_id, 0)
    return _COMPLETE.pack(lease_id, len(filled) + 1) + bytes(map(bool, filled))


def read_complete(reader: Reader) -> tuple[int, list[bool] | None]:
    lease_id, flags = reader.unpack(_COMPLETE)
    return lease_id, None if flags == 0 else [flag != 0 for flag in reader.take(flags - 1)]


def encode_finished(request: bytes, finish_reason: str, last_turn: bool) -> bytes:
    raw = finish_reason.encode()[:MAX_TEXT_BYTES]
    return _TIER.pack(last_turn, len(raw)) + raw + request


def read_finished(reader: Reader) -> tuple[str, bool]:
    """Finish reason, last turn."""
    last_turn, num_reason = reader.unpack(_TIER)
    return reader.text(num_reason), bool(last_turn)


def encode_flush(result: FlushResult) -> bytes:
    fields = {"ok": result.ok, "written": result.written, "missing": result.missing, "undeleted": result.undeleted}
    return encode_json(fields)


def decode_flush(raw: bytes) -> FlushResult:
    fields = decode_json(raw)
    ok = fields.get("ok")
    if not isinstance(ok, bool):
        raise ProtocolError("the answer to a flush does not say whether all is well")
    counts = [fields.get(name, {}) for name in ("written", "missing", "undeleted")]
    if not all(isinstance(count, dict) for count in counts):
        raise ProtocolError("the answer to a flush has counts of another kind")
    return FlushResult(ok, *counts)


def encode_number(number: int) -> bytes:
    return _NUMBER.pack(number)


def read_number(reader: Reader) -> int:
    (number,) = reader.unpack(_NUMBER)
    return int(number)


def encode_seconds(seconds: float) -> bytes:
    return _SECONDS.pack(seconds)


def read_seconds(reader: Reader) -> float:
    (seconds,) = reader.unpack(_SECONDS)
    return check_timeout(seconds)


def encode_prefill(num_tokens: int, seconds: float) -> bytes:
    return _PREFILL.pack(num_tokens, seconds)


def read_prefill(reader: Reader) -> tuple[int, float]:
    num_tokens, seconds = reader.unpack(_PREFILL)
    return num_tokens, seconds


# ---- answers --------------------------------------------------------------------------------------------------------


def encode_match(match: Match) -> bytes:
    head = _MATCH.pack(
        match.num_blocks,
        match.num_tokens,
        match.known,
        match.pending,
        CUTS.index(match.cut),
        len(match.by_tier),
        match.compute_wait_s,
    )
    return head + _encode_tiers(match.by_tier)


def decode_match(raw: bytes) -> Match:
    reader = Reader(raw)
    num_blocks, num_tokens, known, pending, cut, num_tiers, waited_s = reader.unpack(_MATCH)
    by_tier = _read_tiers(reader, num_tiers)
    reader.end()
    return Match(num_blocks, num_tokens, bool(pending), by_tier, known, _member(CUTS, cut), waited_s)


def encode_load(lease: LoadLease, status: LeaseStatus) -> bytes:
    head = _LOAD.pack(
        lease.num_blocks,
        lease.num_tokens,
        STATES.index(status.state),
        status.num_blocks,
        status.num_tokens,
        len(lease.by_tier),
        len(lease.pages),
    )
    return head + _encode_tiers(lease.by_tier) + _encode_pages(lease.pages)


def decode_load(raw: bytes, lease_id: int, slot_base: int) -> tuple[LoadLease, LeaseStatus]:
    """slot_base: added to slot numbers, so that those of different slabs differ."""
    reader = Reader(raw)
    num_blocks, num_tokens, state, usable, usable_tokens, num_tiers, num_pages = reader.unpack(_LOAD)
    by_tier = _read_tiers(reader, num_tiers)
    pages = _read_pages(reader, num_pages, slot_base)
    reader.end()
    status = LeaseStatus(_member(STATES, state), usable, usable_tokens)
    return LoadLease(lease_id, num_blocks, num_tokens, pages, by_tier), status


def encode_status(status: LeaseStatus) -> bytes:
    return _STATUS.pack(STATES.index(status.state), status.num_blocks, status.num_tokens)


def decode_status(raw: bytes) -> LeaseStatus:
    reader = Reader(raw)
    state, num_blocks, num_tokens = reader.unpack(_STATUS)
    reader.end()
    return LeaseStatus(_member(STATES, state), num_blocks, num_tokens)


def encode_save(lease: SaveLease) -> bytes:
    return _SAVE.pack(lease.skipped, len(lease.pages)) + _encode_pages(lease.pages)


def decode_save(raw: bytes, lease_id: int, slot_base: int) -> SaveLease:
    reader = Reader(raw)
    skipped, num_pages = reader.unpack(_SAVE)
    pages = _read_pages(reader, num_pages, slot_base)
    reader.end()
    return SaveLease(lease_id, pages, skipped)


def _encode_pages(pages: Sequence[SlotPage]) -> bytes:
    pack = _PAGE.pack
    return b"".join([pack(page.block, page.group, page.slot) for page in pages])


def _read_pages(reader: Reader, num_pages: int, slot_base: int) -> tuple[SlotPage, ...]:
    raw = reader.take(num_pages * _PAGE.size)
    return tuple([SlotPage(block, group, slot_base + slot) for block, group, slot in _PAGE.iter_unpack(raw)])


def _encode_tiers(by_tier: dict[str, int]) -> bytes:
    return b"".join(_TIER.pack(len(name), count) + name.encode() for name, count in by_tier.items())


def _read_tiers(reader: Reader, num_tiers: int) -> dict[str, int]:
    by_tier = {}
    for _ in range(num_tiers):
        num_name, count = reader.unpack(_TIER)
        by_tier[reader.text(num_name)] = count
    return by_tier


def _member(members: tuple[Any, ...], index: int) -> Any:
    if index >= len(members):
        raise ProtocolError(f"answer has number {index} where only {len(members)} are known")
    return members[index]
