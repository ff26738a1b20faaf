"""Admission by forecast: a page that would make another leave its tier must be worth more than that one."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from eviction.ttl import Ttl
from kvstore.plan.state import Page


def worthier(
    batch: dict[Page, bool], victims: Sequence[Page], policy: Ttl[Page] | None, now: float
) -> dict[Page, bool]:
    """Return those of `batch` that are worth more, by the policy's forecast, than the victim that each would displace.

    The page worth least is compared with the first victim, and so on; what displaces none is always taken.
    """
    if not victims or policy is None:
        return batch
    ranked = sorted(zip(policy.worth(list(batch), now), batch, strict=True), key=itemgetter(0))
    bars = policy.worth(victims, now)
    refused = {page for (worth, page), bar in zip(ranked, bars, strict=False) if worth <= bar}
    return {page: is_saved for page, is_saved in batch.items() if page not in refused}
