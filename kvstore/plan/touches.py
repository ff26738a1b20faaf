"""Touches: a medium is told of uses, so that what is in use keeps its time to live there, and its place in its order.

Pages of one time to live travel together. A medium that lost some says so, and they are owed to it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kvstore.plan.deadlines import deadline, time_to_live
from kvstore.plan.records import Op, Priority
from kvstore.plan.state import Page
from kvstore.plan.steps import parts
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.transfers import TransferBook

TOUCH_BATCH = 512  # keys; one Redis round trip or one LMDB transaction of a few milliseconds
PATIENCE_S = 60.0  # after which a medium need not be told any more


def send_touches(
    transfers: TransferBook, plan: TierPlan, pages: Sequence[Page], wall: float, now: float, *, is_limited: bool
) -> None:
    """Tell a tier of a use of pages that it has, given tail first. Under the store's lock.

    wall, now: Unix time, and the planner's.
    is_limited: it may have been told of a time to live that they do not have any more.
    """
    for ttl_s, group in groupby(pages, key=lambda page: time_to_live(page.block, plan.ttl_s)):
        for batch in parts(list(group), TOUCH_BATCH):
            transfers.send(
                Op.TOUCH,
                plan.name,
                [page.key for page in batch],
                batch,
                priority=Priority.SAVE,
                deadline=now + PATIENCE_S,
                expires_at=deadline(wall, ttl_s, is_limited=is_limited),
            )
