"""Who may use a daemon: tenants, each with a token, a salt, and shares of the tiers of its own.

A tenant's pages lie in stores of its own, cut to its quota; so one tenant can neither see nor evict what another
stored, and its statistics are its own. In Redis, which all tenants share, the salt in every block hash keeps them
apart. Clients on the unix socket, and on loopback where no tokens are configured, are the tenant LOCAL.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """One user of the daemon.

    name:       also the name of its directory below the disk tier's.
    salt:       part of all its block hashes; "" only for LOCAL.
    host_bytes, disk_bytes: its share of the tiers; None is what the configuration gives.
    redis:      whether its pages go to Redis, where nothing bounds them.
    is_operator: may see all tenants' metrics, and attach, detach and resize tiers.
    """

    name: str
    salt: str = ""
    host_bytes: int | None = None
    disk_bytes: int | None = None
    redis: bool = True
    is_operator: bool = False


LOCAL = Tenant("local", is_operator=True)
