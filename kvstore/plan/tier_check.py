"""The books of a lower tier, compared with the pages. For tests."""

from __future__ import annotations

from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import Op
from kvstore.plan.state import Page


def check_tier(tier: LowerTier, pages: set[Page]) -> None:
    """Assert that the books agree with the pages. For tests."""
    copies = {page for page in pages if (page.homes | page.spilling) & tier.bit}
    flying = {
        page
        for flight in tier.transfers.under_way()
        if flight.transfer.op is Op.SPILL and flight.transfer.tier == tier.plan.name
        for page in flight.pages
    }
    assert len(copies | flying) == tier.used_pages, (
        f"{tier.plan.name}: {len(copies | flying)} copies, {tier.used_pages} booked"
    )
    tier.debts.check()
    assert len(flying) == tier.in_flight, f"{tier.plan.name}: {len(flying)} flying, {tier.in_flight} booked"
    if tier.plan.capacity_pages is not None and not tier.plan.is_shared:  # else others' pages are learned of late
        assert tier.used_pages <= tier.plan.capacity_pages, f"{tier.plan.name}: over capacity"
