"""Times to live as a medium is told of them: deadlines in Unix time, 0 where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import inf

from eviction.ttl import Ttl
from kvstore.plan.state import Block, Page

FOR_EVER_S = 10 * 365 * 86400.0  # a medium is told of no deadline by none at all, which leaves the one it has


def deadline(now: float, ttl_s: float, *, is_limited: bool = False) -> float:
    """Return when a page that is used now is over. is_limited: the medium may have been told of a limit before."""
    if ttl_s > 0:
        return now + ttl_s
    return now + FOR_EVER_S if is_limited else 0.0


def time_to_live(block: Block, usual_s: float) -> float:
    """Return for how long a block lives from its use on, on a tier that keeps pages for `usual_s`; 0 means always."""
    own = block.hint.ttl_s
    ttl_s = usual_s if own is None else own
    return ttl_s if block.left_s == inf else min(ttl_s or inf, block.left_s)


def begin_life(policy: Ttl[Page], pages: Sequence[Page], now: float) -> None:
    """Enter pages, given in path order, in a policy: tail first, each with the time that is left to it."""
    for hint, group in groupby(reversed(pages), key=lambda page: page.block.hint):
        policy.add(list(group), now, hint)
    for page in pages:
        if page.block.left_s != inf:
            policy.shorten((page,), now, page.block.left_s)
