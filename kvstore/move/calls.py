"""From a transfer to the call of its tier. Pure: no thread, no lock; it raises what the tier raises."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.errors import TierError
from kvstore.plan.records import Op, Transfer
from kvstore.tiers.base import CLEARED, Claimable, Sweepable, Tier

CLEAR_TIMEOUT_S = 60.0  # a walk over about a hundred million keys


def call_tier(
    tier: Tier, transfer: Transfer, slot_view: Callable[[int], memoryview], timeout_s: float
) -> tuple[bool, ...]:
    """Call the tier; one answer per key. Raises TierError where there are not as many."""
    keys = transfer.keys
    match transfer.op:
        case Op.FETCH:
            views = [slot_view(slot) for slot in transfer.slots]
            answer = tier.read_into(keys, views, transfer.metas, timeout_s=timeout_s)
        case Op.SPILL:
            views = [slot_view(slot) for slot in transfer.slots]
            answer = tier.write_from(keys, views, transfer.metas, evict=transfer.evict, timeout_s=timeout_s)
        case Op.PROBE:
            answer = tier.contains(keys, timeout_s=timeout_s)
        case Op.TOUCH:
            answer = tier.touch(keys, expires_at=transfer.expires_at, timeout_s=timeout_s)
        case Op.DELETE:
            tier.delete(keys, timeout_s=timeout_s)
            answer = [True] * len(keys)
        case Op.CLEAR:
            if not isinstance(tier, Sweepable):
                raise TierError("it does not know what it has")
            extra, num_keys = tier.counters.extra, tier.sweep(timeout_s=timeout_s)
            extra[CLEARED] = extra.get(CLEARED, 0) + num_keys
            answer = []
        case Op.CLAIM:
            claims = _claimable(tier)
            answer = claims.claim(keys, token=transfer.token, lease_s=transfer.lease_s, timeout_s=timeout_s)
        case Op.UNCLAIM:
            _claimable(tier).unclaim(keys, token=transfer.token, timeout_s=timeout_s)
            answer = [True] * len(keys)
    if len(answer) != len(keys):
        raise TierError(f"{len(answer)} answers for {len(keys)} keys")
    return tuple(answer)


def longest_s(transfer: Transfer, timeout_s: float) -> float:
    """How long the tier may take for it, where any other call may take `timeout_s`."""
    return CLEAR_TIMEOUT_S if transfer.op is Op.CLEAR else timeout_s


def in_words(transfer: Transfer) -> str:
    """The transfer in one line of a log."""
    return f"{transfer.op.value} of {len(transfer.keys)} pages" if transfer.keys else transfer.op.value


def moved_bytes(transfer: Transfer, ok: tuple[bool, ...]) -> int:
    """The bytes of the pages that were moved."""
    if transfer.op not in (Op.FETCH, Op.SPILL):
        return 0
    return sum(meta.num_bytes for meta, is_ok in zip(transfer.metas, ok, strict=False) if is_ok)


def _claimable(tier: Tier) -> Claimable:
    if not isinstance(tier, Claimable):
        raise TierError("it takes no claims")
    return tier


def one_line(error: BaseException) -> str:
    """An error as outcomes and reasons tell it."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"
