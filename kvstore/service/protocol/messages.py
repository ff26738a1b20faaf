"""The content of frames: calls of a client. Each is one struct, and its schema is the check.

A message is an array in MessagePack; a call's first element is its number. `encode` writes whatever is one,
`read_call` and `CallReply.read` (replies.py) take apart what came and raise ProtocolError for anything else: another
number of fields, another type, a value out of its range, a text or list beyond its length, bytes behind the end.
Lengths are looked at before memory is taken for them. A new verb is one more subclass of `Call`, and a handler in the
daemon's session.

A message about a request names it by a number of the client's, and brings only the keys that the daemon has not seen:
`base` says how many the client believes are there. A daemon that knows another number answers RESEND, and the
message comes again with all keys. So the daemon may forget, restart or be another one, and nothing is out of step.
Where there are more than PIECE_KEYS to bring, messages of `KeysCall` bring all but the last of them before.

Leases are numbered by the client, too: a call whose answer never came can still be undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Annotated, Any, Union

import msgspec
from msgspec import Meta

from kvstore.errors import RequestError
from kvstore.hints.actions import MAX_PRIORITY, HintKind
from kvstore.hints.limits import MAX_NAME
from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.plan.records import Request, RequestOptions
from kvstore.plan.wishes import Wish
from kvstore.service.protocol.frames import MAX_BODY_BYTES, ProtocolError
from radix.hashing import BlockHash

KEY_BYTES = 32
MAX_KEYS = 1 << 20  # of a request, 16 million tokens in blocks of 16; each takes some 75 bytes in the daemon
PIECE_KEYS = 1 << 14  # in one message
MAX_TIMEOUT_S = 600.0
MAX_PREFILL_S = 86400.0
MAX_TEXT = 1024  # characters: owners, sessions, reasons
MAX_STATES = 256  # of one save
MAX_OUTCOMES = 4096  # of one hint

STAGING = 1 << 31  # first number of a slot of staging (`service.isolate`); a slab has fewer slots
PAGE_BYTES = 10  # of a page in an answer: block 4, group 2, slot 4
MAX_LEASE_PAGES = (MAX_BODY_BYTES - 4096) // PAGE_BYTES  # that an answer can tell

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Name = Annotated[str, Meta(max_length=MAX_NAME)]
Key = Annotated[BlockHash, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
TimeoutS = Annotated[float, Meta(ge=0, le=MAX_TIMEOUT_S)]  # NaN is in no range


class FrameContent(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What has a place in a frame: a call, an answer, or a part of one."""


# ---- requests -------------------------------------------------------------------------------------------------------


class Options(FrameContent):
    """The options of a request, but for the tenant, which is part of the keys already (see RequestOptions).

    payer: a digest of its name (see Request).
    """

    session: Text = ""
    priority: int = 0
    ttl_s: float | None = None
    retain_until: float = 0.0
    pin: bool = False
    single_flight: bool = False
    step_blocks: int = 1
    whole: bool = False
    last_turn: bool = False
    exact: bool = False
    payer: Text = ""

    @staticmethod
    def of(request: Request) -> Options | None:
        """Return a request's options as they are sent; None for the usual ones."""
        sent = Options(*[getattr(request.options, name) for name in _OPTIONS])
        if request.payer:
            sent.payer = request.payer
        if type(sent.retain_until) is not float:  # a whole number may be of more digits than a message takes
            sent = msgspec.structs.replace(sent, retain_until=float(sent.retain_until))
        return None if sent == _USUAL else sent

    def options(self) -> RequestOptions:
        """Return the options as the store takes them."""
        return RequestOptions(**{name: getattr(self, name) for name in _OPTIONS})


_OPTIONS = tuple(field.name for field in fields(RequestOptions) if field.name != "tenant")
_USUAL = Options()


class RequestPart(FrameContent):
    """The request that a call is about (see Request), with its keys from `base` on.

    options: only where base is 0; None are the usual ones.
    """

    id: Number
    base: Annotated[int, Meta(ge=0, le=MAX_KEYS)]
    keys: Annotated[list[Key], Meta(max_length=PIECE_KEYS)]
    num_tokens: Number
    held: Count
    options: Options | None = None


def part_of(request: Request, base: int, end: int) -> RequestPart:
    """Return the request, with its keys [base, end)."""
    options = Options.of(request) if base == 0 else None
    return RequestPart(request.id, base, request.keys[base:end], request.num_tokens, request.held, options)


def too_long(num_keys: int) -> RequestError:
    """Return the answer to a request with too many blocks, which a client gives itself."""
    return RequestError(f"request has {num_keys} blocks; a daemon takes at most {MAX_KEYS}")


# ---- calls, as the client makes them and the daemon reads them ------------------------------------------------------


class Call(FrameContent):
    """A message of a client. Numbers of verbs that are gone are not given again."""


class LookupCall(Call, tag=3):
    """Ask for the longest prefix, waiting for pending tiers: MatchAnswer."""

    request: RequestPart
    timeout_s: TimeoutS


class PrepareLoadCall(Call, tag=4):
    """Lease blocks [first, end) for reading, under a number of the client's: LoadAnswer."""

    request: RequestPart
    lease: Number
    first: Count
    end: Count
    owner: Text


class WaitCall(Call, tag=5):
    """Wait until a load is ready: StatusAnswer."""

    lease: Number
    timeout_s: TimeoutS


class PrepareSaveCall(Call, tag=6):
    """Lease slots for what is not stored of blocks [first, end), and of the states after some of them: SaveAnswer."""

    request: RequestPart
    lease: Number
    first: Count
    end: Count
    owner: Text
    states: Annotated[list[Count], Meta(max_length=MAX_STATES)] = []


class CompleteCall(Call, tag=7):
    """End a lease well; filled: which of its pages are whole, None for all."""

    lease: Number
    filled: Annotated[list[bool], Meta(max_length=MAX_LEASE_PAGES)] | None


class ReleaseCall(Call, tag=8):
    """End a lease badly, now or before it is granted."""

    lease: Number


class PrefetchCall(Call, tag=10):
    """Start bringing the known prefix into host memory: NumberAnswer, a ticket."""

    request: RequestPart


class CancelCall(Call, tag=11):
    """Stop a prefetch."""

    ticket: int


class FinishedCall(Call, tag=12):
    """The request is over."""

    request: RequestPart
    finish_reason: Text
    last_turn: bool
    reply_tokens: int = -1


class PinCall(Call, tag=13):
    """Keep resident pages in host memory: NumberAnswer, of blocks."""

    request: RequestPart


class UnpinCall(Call, tag=14):
    """Undo Pin: NumberAnswer, of blocks."""

    request: RequestPart


class ForgetCall(Call, tag=15):
    """Delete blocks from `first` on: NumberAnswer, of blocks."""

    request: RequestPart
    first: Count


class ObservePrefillCall(Call, tag=16):
    """Tell how fast the engine computes."""

    num_tokens: Annotated[int, Meta(gt=0, lt=1 << 32)]
    seconds: Annotated[float, Meta(gt=0, le=MAX_PREFILL_S)]


class FlushCall(Call, tag=17):
    """Wait until all is on its tiers: FlushAnswer."""

    timeout_s: TimeoutS


class StatsCall(Call, tag=18):
    """Ask for counters and gauges: StatsAnswer."""


class PeekCall(Call, tag=21):
    """As Lookup, without its consequences: MatchAnswer."""

    request: RequestPart
    timeout_s: TimeoutS


class EventsCall(Call, tag=22):
    """Ask what came and went since the last answer, and wait for it: EventsAnswer (events.py), or nothing."""

    timeout_s: TimeoutS


class SetTtlCall(Call, tag=24):
    """Give known blocks a time to live: NumberAnswer, of blocks."""

    request: RequestPart
    ttl_s: float


class KeysCall(Call, tag=23):
    """Bring keys of a request that is too long for one message, before the call about it."""

    request: RequestPart


class WishPart(FrameContent):
    """A Wish, see kvstore/plan/wishes.py."""

    action_id: Name
    kind: HintKind
    first: Count
    end: Count
    ttl_s: Annotated[float, Meta(ge=0, le=1e9)]
    is_clipped: bool
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]
    session: Name
    is_own: bool

    @staticmethod
    def of(wish: Wish) -> WishPart:
        """Return the wish as it is sent."""
        return WishPart(*wish)

    def wish(self) -> Wish:
        """Return the wish that was sent."""
        return Wish(*msgspec.structs.astuple(self))


class OutcomePart(FrameContent):
    """A HintOutcome: of one that ended with the client, to be counted, or of the daemon's answer."""

    action_id: Name
    action: Name
    status: HintStatus
    tokens: Number = 0
    until: float | None = None
    reason: Text = ""

    @staticmethod
    def of(outcome: HintOutcome) -> OutcomePart:
        """Return the outcome as it is sent."""
        return OutcomePart(
            outcome.action_id, outcome.action, outcome.status, outcome.tokens, outcome.until, outcome.reason
        )

    def outcome(self) -> HintOutcome:
        """Return the outcome that was sent."""
        return HintOutcome(self.action_id, self.action, self.status, self.tokens, self.until, self.reason)


class HintCall(Call, tag=25):
    """Do what a hint says about a request: OutcomesReply, one for each wish. The request is over if it is not theirs.

    ended: outcomes that the client has given itself, to be counted.
    """

    request: RequestPart | None
    wishes: Annotated[list[WishPart], Meta(max_length=MAX_OUTCOMES)]
    ended: Annotated[list[OutcomePart], Meta(max_length=MAX_OUTCOMES)]


def bounded(timeout_s: float) -> float:
    """Return the wait that a daemon takes which comes nearest to what a caller asks for."""
    return min(max(0.0, timeout_s), MAX_TIMEOUT_S)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def encode(message: FrameContent) -> bytes:
    """Write a message down."""
    return _encoder.encode(message)


def read_call(raw: bytes) -> Call:
    """Take a client's message apart. Raises ProtocolError."""
    call: Call = read(_calls, raw)
    return call


def flags(filled: Sequence[bool] | None) -> list[bool] | None:
    """Return flags of a save as they are sent, whatever their type."""
    return None if filled is None else list(map(bool, filled))


def read(decoder: msgspec.msgpack.Decoder[Any], raw: bytes) -> Any:
    """Take a message apart by the decoder of its kind. Raises ProtocolError."""
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message of {len(raw)} bytes is not valid: {error}") from None


def _plain(value: object) -> object:
    """Return a number of NumPy's as one of Python's: callers have both."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise NotImplementedError(f"{type(value).__name__} has no place in a message")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_calls = msgspec.msgpack.Decoder(Union[tuple(Call.__subclasses__())])
