"""The screen that `kvstore serve` shows when it listens, and its lines when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvstore.config.sections import Config
from kvstore.service.daemon.preflight import Preflight
from kvstore.service.daemon.state import DaemonState
from kvstore.tiers import registry
from kvstore.tiers.kind import TierKind
from kvstore.units import format_bytes, format_seconds

SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
GIVES_HUGE_PAGES = ("always", "within_size", "advise", "force")


def started(state: DaemonState, preflight: Preflight, max_files: int, port: int, num_stores: int) -> list[str]:
    """The lines that are told once everything is open."""
    config, service = state.config, state.config.service
    lines = [
        f"kvstore {state.version}: the node daemon is up",
        f"  engines   KVSTORE_SERVICE__URL=unix://{state.progress.socket}",
    ]
    if service.http_port is None:
        lines.append("  http      off (service.http_port)")
    else:
        scheme = "https" if service.tls_cert is not None else "http"
        host = f"[{service.http_host}]" if ":" in service.http_host else service.http_host
        url = f"{scheme}://{host}:{port}"
        lines.append(
            f"  http      {url}/ (dashboard, API, /metrics, /readyz){', by token' if state.tokens is not None else ''}"
        )
    parts = f", {service.max_namespaces} namespaces share it" if service.max_namespaces > 1 else ""
    lines.append(f"  host      {format_bytes(config.host.capacity_bytes)}{parts}; huge pages: {huge_pages(config)}")
    on = {kind.name: (kind, section) for kind, section in config.tiers()}
    lines += [
        f"  {name:<9} {_tier(*on[name], preflight, num_stores) if name in on else _off(name)}" for name in _names(on)
    ]
    if state.tokens is not None:
        lines.append(f"  tenants   {len(state.tokens.tenants)} by token, and local on the unix socket")
    lines.append(f"  clients   at most {service.max_clients}; open files at most {max_files}")
    return lines


def ending(state: DaemonState, why: str) -> str:
    """Said when it is told to stop."""
    clients, leases = len(state.sessions), state.num_leases
    return (
        f"kvstore: {why}: ending {clients} client{'' if clients == 1 else 's'} with {leases} open "
        f"lease{'' if leases == 1 else 's'}, then writing what is owed to lower tiers, "
        f"at most {format_seconds(state.config.service.drain_s)}"
    )


def ended(num_owed: int) -> str:
    """Said at the end. num_owed: pages that were not written behind."""
    return "kvstore: ended" if not num_owed else f"kvstore: ended; {num_owed} pages were not written to a lower tier"


def huge_pages(config: Config) -> str:
    """Whether the slab gets them."""
    if not config.host.huge_pages:
        return "no (host.huge_pages)"
    try:
        words = SHMEM.read_text().split()
    except OSError:
        return "unknown"
    chosen = next((word.strip("[]") for word in words if word.startswith("[")), "")
    return "yes" if chosen in GIVES_HUGE_PAGES else f"no (the kernel gives shared memory none: {SHMEM} is {chosen})"


def _names(on: Iterable[str]) -> list[str]:
    # Of other distributions only what is used: a tier that nobody asked for is not imported.
    return [name for name in registry.names() if name in on or registry.is_ours(name)]


def _off(name: str) -> str:
    return f"off ({name}.{registry.kind_of(name).switch})"


def _tier(kind: TierKind[Any], section: Any, preflight: Preflight, num_stores: int) -> str:
    home = kind.home(section)
    if home is not None:
        size = "" if kind.capacity is None else f"{format_bytes(getattr(section, kind.capacity))} in "
        found = f"{num_stores} namespaces found there" if num_stores else "nothing stored there yet"
        return f"{size}{home.absolute()}; {found}"
    value = getattr(section, kind.switch)
    if kind.name in preflight.unreached:
        return f"{value}: NOT REACHED, asked again: {preflight.unreached[kind.name]}"
    asked = preflight.asked.get(kind.name)
    return f"{value}" if asked is None else f"{value}: reached, {asked.text}"
