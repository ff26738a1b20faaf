"""Media of this machine, measured: what `kvstore bench` finds in its quick way, a few seconds for each tier.

host    pages of 2 MiB loaded through a store: lookup, lease, memcpy, release. A GPU's own copy engine is not asked.
disk    pages of 2 MiB read cold from a disk tier in that directory, by as many threads as a tier has
redis   pages of 2 MiB fetched from that server, over as many connections as a tier has

The latency of a load is what a page of 256 KiB takes by itself, less what its bytes take at that rate.
"""

from __future__ import annotations

from kvstore.errors import ConfigError
from kvstore.lab.bench import Table, run
from kvstore.lab.hardware import Medium
from kvstore.units import KiB

# The row of a workload's tables that a load is: the last of those that begin so, and its twin that goes page by page.
ROWS = {
    "host": ("load:", "load:"),
    "disk": ("disk tier, 4 threads", "disk tier, 1 thread"),
    "redis": ("redis tier, 3 connections", "redis tier, 1 connection"),
}
PAGE_BYTES = 256 * KiB
READS = {"host": "pages of", "disk": "read", "redis": "read"}


def measure(tier: str, place: str) -> Medium:
    """Measure a tier of this machine. place: "" for host memory, a directory, the URL of a Redis server.

    Raises ConfigError if there is nothing to measure there, TierUnavailable if a server does not answer.
    """
    tables = [table for table in run(tier, place, quick=True) if READS[tier] in table.name]
    many, one = ROWS[tier]
    small, large = (_of_size(tables, size) for size in ("256 KiB", "2048 KiB"))
    rate = _per_s(large, many)
    latency_s = max(0.0, PAGE_BYTES / _per_s(small, one) - PAGE_BYTES / rate)
    return Medium(f"measured {place}".strip(), rate, latency_s)


def _of_size(tables: list[Table], size: str) -> Table:
    return next(table for table in tables if size in table.name)


def _per_s(table: Table, name: str) -> float:
    for timing in table.timings:
        if timing.name.startswith(name):
            return timing.per_s
    raise ConfigError(f"the workload {table.name!r} has no row {name!r}")
