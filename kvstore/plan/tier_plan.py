"""The face of a lower tier towards the planner: its name, its room, and what can be asked of it.

Made where stores are opened (build.py), handed to the planner with the tier's lane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eviction.ttl import Ttl
from kvstore.page import PageKey
from kvstore.plan.state import Page


@dataclass(frozen=True, slots=True)
class TierPlan:
    """The planner's settings for a lower tier.

    capacity_pages: None where the medium evicts by itself.
    policy:         order of eviction; None where the medium evicts by itself.
    is_indexed:     what the catalog says of this tier is good enough for a lookup (disk); else only an answered
                    probe is (Redis).
    is_shared:      others write to it too, so a lookup probes it for what the catalog does not know.
    admit:          "always"; "second_use": only pages that were used again; "predicted": where a page would leave for
                    another, only if the policy's forecast says that this one is worth more.
    exclusive:      pages are written when they are about to leave host memory, and copies of those it has leave first.
    max_writes_per_day: bytes; 0 for no bound.
    window_pages:   pages that may be on their way to it at once.
    workers:        batches its lane works on at the same time.
    can_claim:      machines that share it can tell each other there what they are computing.
    can_clear:      it deletes all it has of this namespace when told so, without being told what that is.
    has_room_for:   False for pages that it could never store, by their names: they are not owed to it. None: for all.
    """

    name: str
    capacity_pages: int | None
    policy: Ttl[Page] | None
    is_indexed: bool
    is_shared: bool
    admit: str = "always"
    ttl_s: float = 0.0
    window_pages: int = 64
    workers: int = 1
    can_claim: bool = False
    can_clear: bool = False
    exclusive: bool = False
    max_writes_per_day: int = 0
    has_room_for: Callable[[PageKey], bool] | None = None
