"""What is good and bad about a Redis server as a place for pages, from what it says of itself.

Each line is measured behaviour of servers (docs/redis.md has the numbers). A line is *bad* where pages get lost, hits
fail or the machine is in danger, *warn* where the server works worse than it could. What it does not say is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvstore.tiers.redis.info import PageTimes, ServerInfo
from kvstore.units import GiB, MiB, format_bytes, format_seconds

OLDEST = (6, 2)
SMALL_BYTES = 8 * GiB  # a burst of saves turns a smaller memory over within some ticks of LRU's clock
FEW_PAGES = 64
MACHINE_SHARE = 0.9  # of its machine's memory that a server's pages may take; buffers and forks come on top
SLOW_BYTES_S = 100e6  # below, a page of an 8B model is recomputed sooner than it comes

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Advice:
    """One line. where: of which server. why and do: "" where nothing is to be done."""

    where: str
    what: str
    state: State
    found: str
    why: str = ""
    do: str = ""

    @property
    def line(self) -> str:
        """All of it as one line of a log."""
        return (
            f"{self.where}: {self.what} {self.found}: {self.why}; {self.do}" if self.do else f"{self.what} {self.found}"
        )


def advise(server: ServerInfo, *, page_bytes: int, is_bounded: bool = False) -> list[Advice]:
    """Judge one server. page_bytes: of a page. is_bounded: `redis.capacity_bytes` keeps pages within a bound."""
    found: list[Advice] = []
    for what, state, text, why, do in _judged(server, page_bytes, is_bounded):
        found.append(Advice(server.where, what, state, text, why, do))
    return found


def advise_times(where: str, times: PageTimes) -> Advice:
    """Judge how long pages take."""
    slowest = times.page_bytes / max(times.write_s, times.read_s, 1e-9)
    text = (
        f"{format_bytes(times.page_bytes)} written in {format_seconds(times.write_s)}, read in "
        f"{format_seconds(times.read_s)}, one at a time"
    )
    if slowest >= SLOW_BYTES_S:
        return Advice(where, "a page", "ok", text)
    why = "an engine on a GPU recomputes most prefixes sooner, so the store will seldom load from here"
    return Advice(where, "a page", "warn", text, why, "use a server that is nearer, or a faster network")


def differing(servers: list[ServerInfo]) -> list[Advice]:
    """Judge what the nodes of a cluster have that the others have not: what is set on one node is set on one node."""
    found: list[Advice] = []
    for name, what in (("policy", "maxmemory-policy"), ("maxmemory_bytes", "maxmemory"), ("version", "version")):
        values = {getattr(server, name) for server in servers}
        if len(values) > 1:
            text = ", ".join(f"{server.where}: {getattr(server, name)}" for server in servers)
            why = "nodes lose pages at different times" if name != "version" else "nodes behave differently"
            found.append(Advice("cluster", what, "warn", text, why, "set all nodes alike; CONFIG SET reaches one"))
    return found


def _judged(server: ServerInfo, page_bytes: int, is_bounded: bool) -> Iterator[tuple[str, State, str, str, str]]:
    yield from _version(server)
    yield from _role(server)
    yield from _limit(server, page_bytes)
    yield from _policy(server, is_bounded)
    yield from _clients(server)
    yield from _persistence(server)
    yield from _replicas(server)


def _version(server: ServerInfo) -> Iterator[tuple[str, State, str, str, str]]:
    text = f"{server.product or 'unknown'} {server.version or '(its account may not ask)'}".strip()
    if server.product == "redis" and server.numbers and server.numbers < OLDEST:
        yield "version", "bad", text, "commands are missing that pages need", "use 6.2 or later"
    else:
        yield "version", "ok", text, "", ""


def _role(server: ServerInfo) -> Iterator[tuple[str, State, str, str, str]]:
    if server.role == "slave":
        yield "role", "bad", "replica", "it takes no pages; what is saved is lost to this tier", "name its primary"


def _limit(server: ServerInfo, page_bytes: int) -> Iterator[tuple[str, State, str, str, str]]:
    limit = server.maxmemory_bytes
    if limit is None:
        return
    if limit == 0:
        room = f" (its machine has {format_bytes(server.system_bytes)})" if server.system_bytes else ""
        why = f"it grows until its machine has no memory left{room}, and the kernel ends it with all that it holds"
        yield "maxmemory", "bad", "none", why, "CONFIG SET maxmemory <bytes>, half to three quarters of the machine"
        return
    text = format_bytes(limit)
    if server.system_bytes and limit > MACHINE_SHARE * server.system_bytes:
        why = f"its machine has {format_bytes(server.system_bytes)}, and buffers of clients come on top"
        yield "maxmemory", "bad", text, why, f"set it to {format_bytes(int(0.75 * server.system_bytes))} or less"
    elif limit < FEW_PAGES * page_bytes:
        why = f"that is {limit // page_bytes} pages, and each connection that writes takes the room of one"
        yield "maxmemory", "warn", text, why, f"give it {format_bytes(FEW_PAGES * page_bytes)} or more"
    else:
        yield "maxmemory", "ok", f"{text}, {limit // page_bytes} pages of {format_bytes(page_bytes)}", "", ""


def _policy(server: ServerInfo, is_bounded: bool) -> Iterator[tuple[str, State, str, str, str]]:
    policy, limit = server.policy, server.maxmemory_bytes
    if not policy:
        return
    evicted = f", {server.evicted_keys} keys evicted since its start" if server.evicted_keys else ""
    if policy == "noeviction":
        why = "when it is full it takes no more pages"
        do = "CONFIG SET maxmemory-policy allkeys-lfu, or bound what is kept there with redis.capacity_bytes"
        yield ("maxmemory-policy", "ok", policy + " (bounded by redis.capacity_bytes)", "", "") if is_bounded else (
            "maxmemory-policy", "bad", policy, why, do
        )  # fmt: skip
    elif policy.endswith("-random"):
        do = "CONFIG SET maxmemory-policy allkeys-lfu"
        yield "maxmemory-policy", "warn", policy + evicted, "hot pages leave as often as cold ones", do
    elif policy.endswith("-lru") and limit is not None and 0 < limit < SMALL_BYTES:
        why = (
            "its clock ticks once a second: a burst of saves turns this much memory over sooner, and LRU is random then"
        )
        yield "maxmemory-policy", "warn", policy + evicted, why, "CONFIG SET maxmemory-policy allkeys-lfu"
    else:
        yield "maxmemory-policy", "ok", policy + evicted, "", ""


def _clients(server: ServerInfo) -> Iterator[tuple[str, State, str, str, str]]:
    if server.max_clients_memory is None:
        return
    is_by_reference = server.is_valkey and server.numbers >= (9, 1)
    if server.max_clients_memory == "0" and not server.normal_output_limit and not is_by_reference:
        why = (
            "one client that does not read its replies costs a small server most of its pages: replies that wait count"
        )
        yield "maxmemory-clients", "warn", "no limit", why, "CONFIG SET maxmemory-clients 20%"
    else:
        found = "large values go by reference" if is_by_reference else server.max_clients_memory
        yield "maxmemory-clients", "ok", found, "", ""


def _persistence(server: ServerInfo) -> Iterator[tuple[str, State, str, str, str]]:
    kinds = [f"save {server.snapshots}"] if server.snapshots else []
    kinds += ["appendonly yes"] if server.appends else []
    if kinds:
        why = "it writes pages to its disk that can be computed again, forks for it, and takes no page while that fails"
        yield "persistence", "warn", ", ".join(kinds), why, 'CONFIG SET save "", CONFIG SET appendonly no'
    elif server.snapshots is not None:
        yield "persistence", "ok", "off", "", ""


def _replicas(server: ServerInfo) -> Iterator[tuple[str, State, str, str, str]]:
    if not server.replicas:
        return
    text = f"{server.replicas}, backlog {format_bytes(server.backlog_bytes or 0)}"
    if server.backlog_bytes is not None and server.backlog_bytes < 64 * MiB:
        why = "a link that is cut for a moment of saving costs a full resynchronization: a fork, and buffers"
        yield "replicas", "warn", text, why, "CONFIG SET repl-backlog-size 256mb (it counts against maxmemory)"
    else:
        yield "replicas", "ok", text, "", ""
