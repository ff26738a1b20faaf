"""The public face of leases, made of the planner's records of them (state.py).

A lease is the promise at the boundary: the slots it names stay what they are until it ends. It ends by complete or
release, whichever comes first; a second end is ignored, so that clean-up code may always release.
"""

from __future__ import annotations

from collections import Counter

from kvstore.plan.records import LoadLease, SlotPages
from kvstore.plan.state import Load


def load_lease(load: Load, block_size: int) -> LoadLease:
    """The public face of a load that was prepared. Not under the lock: nothing of what it reads changes any more."""
    if not load.num_blocks:
        return LoadLease(load.id, 0, 0)
    return LoadLease(
        load.id,
        load.num_blocks,
        load.num_blocks * block_size,
        SlotPages(load.blocks, [page.group for page in load.pages], load.slots),
        dict(Counter(load.sources[load.first :])),
    )
