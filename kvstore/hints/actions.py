"""The actions of hints that are executed, and their payloads.

All have one shape of payload, of which each uses its part:

    tokens        ids of the prompt that is meant, from its first token on
    block_hashes  or the hashes of its blocks, hexadecimal, from the first on, as the engine makes them
                  neither: the prompt of the request that the hint came with
    start, end    the part of that prompt, in tokens; blocks that lie in it in part count
    ttl_s         how long, in seconds; `duration_s` is the same
    priority      0 to 100, for Retain
    session       name of the conversation, for operators

A payload with an unknown field is rejected, as a misspelt `ttl_s` must not become the default; another version may have
others, and is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvstore.hints.limits import MAX_SESSION, HintLimits, is_text
from kvstore.hints.outcome import HintOutcome, HintStatus

MAX_HASH_DIGITS = 128
MAX_PRIORITY = 100
USUAL_PRIORITY = 50  # of a Retain that does not say


class HintKind(Enum):
    """The actions, in one word each. Sent as the word, or with "kv." before it; capitals do not matter."""

    PIN = "pin"  # a lease: kept in host memory until it ends
    RETAIN = "retain"  # stays longer than others until it ends, and holds no memory
    PREFETCH = "prefetch"  # bring it into host memory
    DEMOTE = "demote"  # write it down, then give its host memory to others
    RELEASE = "release"  # end its pins and what it is retained for
    FORGET = "forget"  # delete it everywhere, with all that continues it
    SHARE = "share"  # nothing to do: what is stored is shared


Position = Annotated[int, Meta(ge=0, lt=1 << 32)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]  # NaN is in no range


class HintPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What comes with an action (see the module). `tokens` is checked where it is hashed."""

    block_hashes: list[Annotated[str, Meta(max_length=MAX_HASH_DIGITS)]] | None = None
    start: Position = 0
    end: Position | None = None
    ttl_s: Seconds | None = None
    duration_s: Seconds | None = None
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] | None = None
    session: Annotated[str, Meta(max_length=MAX_SESSION)] = ""


@dataclass(frozen=True, slots=True)
class HintAction:
    """An action that was read, and can be done if its prompt is known.

    tokens, hashes: of the prompt that is meant, as they were sent; neither where it is that of the hint's own request.
    start, end:     half open, in tokens; end None is the prompt's own.
    ttl_s:          within the limits; is_clipped: less than was asked for.
    """

    action_id: str
    kind: HintKind
    tokens: Any = None
    hashes: Sequence[bytes] | None = None
    start: int = 0
    end: int | None = None
    ttl_s: float = 0.0
    is_clipped: bool = False
    priority: int = 0
    session: str = ""

    def outcome(
        self, status: HintStatus, reason: str = "", *, tokens: int = 0, until: float | None = None
    ) -> HintOutcome:
        """Return what became of it."""
        return HintOutcome(self.action_id, self.kind.value, status, tokens, until, reason)


class Unfit(ValueError):
    """A payload that is none of ours; its text is the reason."""


def read_payload(action_id: str, kind: HintKind, payload: Mapping[str, Any], limits: HintLimits) -> HintAction:
    """Return the action. Raises Unfit with the reason where the payload is not one of its kind."""
    rest = dict(payload)
    tokens, hashes = rest.pop("tokens", None), rest.get("block_hashes")
    if isinstance(hashes, (list, tuple)) and len(hashes) > limits.max_tokens:  # before each of them is looked at
        raise Unfit(f"{len(hashes)} blocks; one action may name {limits.max_tokens} tokens")
    try:
        read = msgspec.convert(rest, HintPayload)
    except (msgspec.ValidationError, RecursionError, OverflowError, UnicodeError) as error:
        raise Unfit(_line(error)) from None
    if not is_text(read.session, MAX_SESSION):
        raise Unfit("session is no text")
    if tokens is not None and read.block_hashes is not None:
        raise Unfit("give either tokens or block_hashes")
    if tokens is not None and (isinstance(tokens, (str, Mapping)) or not hasattr(tokens, "__len__")):
        raise Unfit("tokens must be a list of token ids")
    if tokens is not None and len(tokens) > limits.max_tokens:
        raise Unfit(f"{len(tokens)} tokens; one action may name {limits.max_tokens}")
    if read.end is not None and read.end <= read.start:
        raise Unfit(f"the range [{read.start}, {read.end}) is empty")
    ttl_s, is_clipped = _ttl_s(read, limits)
    return HintAction(
        action_id,
        kind,
        tokens,
        _hashes(read.block_hashes),
        read.start,
        read.end,
        ttl_s,
        is_clipped and kind in (HintKind.PIN, HintKind.RETAIN),
        USUAL_PRIORITY if read.priority is None else read.priority,
        read.session,
    )


def _ttl_s(read: HintPayload, limits: HintLimits) -> tuple[float, bool]:
    """How long, and whether that is less than was asked for."""
    if read.ttl_s is not None and read.duration_s is not None and read.ttl_s != read.duration_s:
        raise Unfit("give either ttl_s or duration_s")
    asked = read.duration_s if read.ttl_s is None else read.ttl_s
    if asked is None:
        return min(limits.default_ttl_s, limits.max_ttl_s), False
    return min(asked, limits.max_ttl_s), asked > limits.max_ttl_s


def _hashes(digits: Sequence[str] | None) -> list[bytes] | None:
    if digits is None:
        return None
    try:
        hashes = [bytes.fromhex(one) for one in digits]
    except ValueError:
        raise Unfit("block_hashes must be hexadecimal") from None
    if not hashes or b"" in hashes:
        raise Unfit("block_hashes has no hash in it" if not hashes else "a block hash is empty")
    return hashes


def _line(error: Exception) -> str:
    """The reason in one line that repeats nothing of what was sent beyond names of fields."""
    return str(error).splitlines()[0][:200] if isinstance(error, msgspec.ValidationError) else type(error).__name__
