"""What is up, in one screen: what `kvstore serve` says when it listens, and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kvstore.service.daemon import Daemon

SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
GIVES_HUGE_PAGES = ("always", "within_size", "advise", "force")


def started(daemon: Daemon, num_stores: int) -> list[str]:
    """The lines that are told once everything is open."""
    config, service = daemon.config, daemon.config.service
    lines = [
        f"kvstore {daemon.app.version}: the node daemon is up",
        f"  engines   KVSTORE_SERVICE__URL=unix://{daemon.socket}",
    ]
    if service.http_port is None:
        lines.append("  http      off (service.http_port)")
    else:
        scheme = "https" if service.tls_cert is not None else "http"
        host = f"[{service.http_host}]" if ":" in service.http_host else service.http_host
        url = f"{scheme}://{host}:{daemon.app.port}"
        lines.append(
            f"  http      {url}/ (dashboard, API, /metrics, /readyz){', by token' if daemon.has_tokens else ''}"
        )
    parts = f", {service.max_namespaces} namespaces share it" if service.max_namespaces > 1 else ""
    lines.append(f"  host      {format_bytes(config.host.capacity_bytes)}{parts}; huge pages: {huge_pages(daemon)}")
    if config.disk.path is None:
        lines.append("  disk      off (disk.path)")
    else:
        found = f"{num_stores} namespaces found there" if num_stores else "nothing stored there yet"
        lines.append(
            f"  disk      {format_bytes(config.disk.capacity_bytes)} in {Path(config.disk.path).absolute()}; {found}"
        )
    lines.append(f"  redis     {_redis(daemon)}")
    if daemon.tokens is not None:
        lines.append(f"  tenants   {len(daemon.tokens.tenants)} by token, and local on the unix socket")
    lines.append(f"  clients   at most {service.max_clients}; open files at most {daemon.budget.limit}")
    return lines


def ending(daemon: Daemon, why: str) -> str:
    """Said when it is told to stop."""
    clients, leases = len(daemon.sessions), daemon.num_leases
    return (
        f"kvstore: {why}: ending {clients} client{'' if clients == 1 else 's'} with {leases} open "
        f"lease{'' if leases == 1 else 's'}, then writing what is owed to disk and Redis, "
        f"at most {format_seconds(daemon.config.service.drain_s)}"
    )


def ended(num_owed: int) -> str:
    """Said at the end. num_owed: pages that were not written behind."""
    return "kvstore: ended" if not num_owed else f"kvstore: ended; {num_owed} pages were not written to a lower tier"


def huge_pages(daemon: Daemon) -> str:
    """Whether the slab gets them."""
    if not daemon.config.host.huge_pages:
        return "no (host.huge_pages)"
    try:
        words = SHMEM.read_text().split()
    except OSError:
        return "unknown"
    chosen = next((word.strip("[]") for word in words if word.startswith("[")), "")
    return "yes" if chosen in GIVES_HUGE_PAGES else f"no (the kernel gives shared memory none: {SHMEM} is {chosen})"


def _redis(daemon: Daemon) -> str:
    url, seen = daemon.config.redis.url, daemon.preflight
    if url is None:
        return "off (redis.url)"
    if seen.redis is None:
        return f"{url}: NOT REACHED, asked again: {seen.redis_problem}"
    info = seen.redis
    limit = (
        ""
        if info.maxmemory_bytes is None
        else f", maxmemory {format_bytes(info.maxmemory_bytes) if info.maxmemory_bytes else 'none'}"
    )
    policy = f", maxmemory-policy {info.policy}" if info.policy else ", policy unknown (its account may not ask)"
    return f"{url}: reached, version {info.version or 'unknown'}{limit}{policy}"
