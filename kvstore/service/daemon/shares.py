"""How many of a thing that all tenants share one of them may have.

A part is kept for each of the others as long as they do not use it: whatever the rest do, each tenant gets `kept` of
them. Of three tenants or more none may have above half. With one there is nobody to keep anything for. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping


def kept(most: int, num_tenants: int) -> int:
    """How many each tenant is sure of."""
    return most // (2 * num_tenants) if num_tenants > 1 else most


def has_room(tenant: str, taken: Mapping[str, int], most: int, num_tenants: int) -> bool:
    """Whether a tenant may have one more. taken: what each tenant has now; num_tenants: that there are."""
    total, own = sum(taken.values()), taken.get(tenant, 0)
    if total >= most:
        return False
    sure = kept(most, num_tenants)
    if num_tenants < 2 or own < sure:
        return True
    owed = sum(max(0, sure - count) for name, count in taken.items() if name != tenant)
    absent = num_tenants - len(taken.keys() | {tenant})
    cap = most if num_tenants < 3 else max(1, most // 2)
    return own < cap and total + owed + absent * sure < most
