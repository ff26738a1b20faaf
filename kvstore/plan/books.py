"""The books that all parts of the planner share: what there is, and where it is.

Made by the planner, and handed to each part instead of its six members. It has no verbs that change
anything: what is done with a member is the member's own, or the part's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eviction.ttl import Ttl
from kvstore.clock import Clock
from kvstore.layout import Layout
from kvstore.plan.catalog import Catalog
from kvstore.plan.cost import CostModel
from kvstore.plan.host import HostMemory
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import HOST, PlanSettings
from kvstore.plan.state import Page
from kvstore.plan.transfers import TransferBook


@dataclass(slots=True)
class Books:
    """Under the store's lock.

    transfers:  those under way, and those waiting for the lanes.
    tiers:      the lower tiers, in the order of their bits; a list that only grows (see lower_tiers.py).
    windows:    of each layer group, in blocks; None means all.
    page_bytes: of each layer group.
    num_groups: of which every block has a page; the others are the pieces of a state.
    """

    layout: Layout
    settings: PlanSettings
    clock: Clock
    catalog: Catalog
    host: HostMemory
    transfers: TransferBook
    costs: CostModel
    tiers: list[LowerTier] = field(default_factory=list)
    windows: list[int | None] = field(init=False)
    page_bytes: list[int] = field(init=False)
    num_groups: int = field(init=False)

    def __post_init__(self) -> None:
        groups = range(len(self.layout.groups))
        self.num_groups = self.layout.block_groups
        self.windows = [self.layout.window_blocks(group) for group in groups]
        self.page_bytes = [self.layout.stored_bytes(group) for group in groups]

    def policies(self) -> Iterator[tuple[str, Ttl[Page]]]:
        """Yield the name and the policy of each tier that has one."""
        yield HOST, self.host.policy
        for tier in self.tiers:
            if tier.plan.policy is not None:
                yield tier.plan.name, tier.plan.policy

    def learned(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return, by tier, the name of a policy that learns, and its tables."""
        return {
            name: (policy.name, policy.learner.tables())
            for name, policy in self.policies()
            if policy.learner is not None
        }
