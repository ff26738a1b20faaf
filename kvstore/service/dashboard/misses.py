"""The lookups of late that fell short, as the dashboard shows them. The daemon's event loop only."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.plan.records import CutReason
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.dashboard.models import Miss
from kvstore.service.http.explain import in_words

MAX_MISSES = 60


def misses_of(stores: Sequence[OpenStore]) -> tuple[list[Miss], dict[str, int]]:
    """Return the last lookups that fell short, and the number of all that are remembered by reason.

    Every new turn of a conversation ends in blocks that were never stored: those come last, or nobody sees another.
    """
    short = [
        (one, shortfall, *in_words(shortfall.told)) for one in stores for shortfall in one.store.admin.shortfalls()
    ]
    short.sort(key=lambda found: (found[2] == CutReason.NEVER_STORED.value, -found[1].at))
    misses: list[Miss] = []
    reasons: dict[str, int] = {}
    for one, shortfall, reason, text in short:
        told = shortfall.told
        reasons[reason] = reasons.get(reason, 0) + 1
        if len(misses) < MAX_MISSES:
            misses.append(
                Miss(
                    at=shortfall.at,
                    tenant=one.tenant.name,
                    namespace=one.id,
                    session=shortfall.session,
                    prompt_tokens=shortfall.num_tokens,
                    hit_tokens=told.match.num_tokens,
                    block=told.block,
                    hash="" if told.key is None else told.key.hex(),
                    reason=reason,
                    text=text,
                )
            )
    return misses, reasons
