"""Redis and Valkey with pages as values: sizes of values, and shards of a cluster, beside bare sockets in the same run.

    python -m tests.bench.bench_redis sizes      64 KiB to 32 MiB on one server of each product
    python -m tests.bench.bench_redis shards     1, 2 and 3 shards; the tier beside one bare socket per shard, at once

Every figure is the median of rounds in which the ways take turns. CPU is of the process that reads or writes and of the
servers, in milliseconds per GiB; on a busy machine it and the ratios stand, and times do not. docs/redis.md has tables.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from redis.crc import key_slot

from kvstore.lab.workloads.redis import BareSocket
from kvstore.page import PageMeta, page_key
from kvstore.testing.redis_server import LocalRedis, find_redis_server
from kvstore.tiers.redis.tier import RedisTier
from kvstore.tiers.redis.url import parse_redis_url
from kvstore.units import GiB, KiB, MiB
from tests.helpers.redis_products import find_valkey_server
from tests.helpers.redis_topologies import NUM_SLOTS, cluster

SIZES = [64 * KiB << step for step in range(10)]
TOTAL_BYTES = 64 * MiB
PAGE_BYTES = 2 * MiB
ROUNDS = 5
THREADS = 3  # as redis.connections
TIMEOUT_S = 120.0
HEAD = (
    "| {} | speed, tier / bare | CPU, bare / tier | bare: client + servers, ms/GiB | tier: client + servers |\n"
    "|---|---|---|---|---|"
)
MAXMEMORY = ("--maxmemory", str(GiB))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pass over all bytes: seconds, and CPU seconds of this process and of the servers."""

    wall_s: float
    ours_s: float
    servers_s: float


def cost_of(run: Callable[[], object], servers: Sequence[LocalRedis]) -> Cost:
    tasks = [f"/proc/{server.pid}/task" for server in servers]

    def spent() -> float:
        """Of all threads; psutil's times have steps of 10 ms."""
        files = [Path(folder, task, "schedstat") for folder in tasks for task in os.listdir(folder)]
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9

    began, ours, theirs = time.perf_counter(), time.process_time(), spent()
    run()
    return Cost(time.perf_counter() - began, time.process_time() - ours, spent() - theirs)


def take_turns(ways: dict[str, Callable[[], object]], servers: Sequence[LocalRedis]) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            found[name].append(cost_of(run, servers))
    return found


def row(told: str, ours: list[Cost], bare: list[Cost], num_bytes: int) -> str:
    """Ratio of throughputs, of CPU, and the CPU of both ends."""
    per_gib = 1000 * GiB / num_bytes
    speed = median(b.wall_s / o.wall_s for o, b in zip(ours, bare, strict=True))
    cpu = median((b.ours_s + b.servers_s) / (o.ours_s + o.servers_s) for o, b in zip(ours, bare, strict=True))
    figures = [median(one.ours_s for one in costs) * per_gib for costs in (bare, ours)]
    servers = [median(one.servers_s for one in costs) * per_gib for costs in (bare, ours)]
    both = [f"{client:.0f} + {server:.0f}" for client, server in zip(figures, servers, strict=True)]
    return f"| {told} | {speed:.2f} | {cpu:.2f} | {both[0]} | {both[1]} |"


def sizes(binary: str) -> None:
    print(HEAD.format("value"))
    for size in SIZES:
        count = max(2, TOTAL_BYTES // size)
        with LocalRedis(binary=binary, maxmemory_bytes=GiB) as server, ExitStack() as stack:
            bare = stack.enter_context(closing(BareSocket(parse_redis_url(server.url))))
            tier = stack.enter_context(closing(RedisTier(server.url, slot_bytes=size, ttl_s=600, connections=1)))
            raw = [b"raw:%d" % number for number in range(count)]
            ways = over_bare(bare, raw, size) | over_tier(tier, count, size, threads=1)
            found = take_turns(ways, [server])
        for verb in ("write", "read"):
            told = f"{size // KiB} KiB, {verb}" if size < MiB else f"{size // MiB} MiB, {verb}"
            print(row(told, found[f"tier {verb}"], found[f"bare {verb}"], count * size), flush=True)


def places(count: int, size: int) -> list[memoryview]:
    """A place of its own for each value: one for all would stay in the processor's cache."""
    return [memoryview(bytearray(os.urandom(64 * KiB) * (size // (64 * KiB)))) for _ in range(count)]


def over_bare(bare: BareSocket, names: Sequence[bytes], size: int) -> dict[str, Callable[[], object]]:
    views = places(len(names), size)

    def write() -> None:
        for name, view in zip(names, views, strict=True):
            bare.set(name, view)

    def read() -> None:
        for name, view in zip(names, views, strict=True):
            bare.get_into(name, view)

    return {"bare write": write, "bare read": read}


def over_tier(tier: RedisTier, count: int, size: int, *, threads: int) -> dict[str, Callable[[], object]]:
    """Pages, in as many threads as a lane has. What was written is forgotten before it is written again."""
    keys = [page_key(os.urandom(32)) for _ in range(count)]
    views = places(count, size)
    metas = [PageMeta(size)] * count
    parts = [range(count)[start::threads] for start in range(threads)]

    def in_threads(call: Callable[..., list[bool]]) -> None:
        def one(part: range) -> bool:
            return all(call(*([row[i] for i in part] for row in (keys, views, metas)), timeout_s=TIMEOUT_S))

        with ThreadPoolExecutor(threads) as pool:
            assert all(pool.map(one, parts))

    def forget() -> None:
        tier.delete(keys, timeout_s=TIMEOUT_S)

    return {
        "tier forget": forget,
        "tier write": lambda: in_threads(tier.write_from),
        "tier read": lambda: in_threads(tier.read_into),
    }


def shards(binary: str) -> None:
    print(HEAD.format("shards"))
    for count in (1, 2, 3):
        with cluster(binary, *MAXMEMORY, shards=count, replicas=0) as servers, ExitStack() as stack:
            lines = [stack.enter_context(closing(BareSocket(parse_redis_url(node.url)))) for node in servers.nodes]
            pages = TOTAL_BYTES // PAGE_BYTES // count * count
            names = [names_on(number, count, pages // count) for number in range(count)]
            bare = [over_bare(line, mine, PAGE_BYTES) for line, mine in zip(lines, names, strict=True)]
            tier = stack.enter_context(
                closing(RedisTier(servers.url, slot_bytes=PAGE_BYTES, ttl_s=600, connections=THREADS))
            )
            pool = stack.enter_context(ThreadPoolExecutor(count))
            ways = {verb: partial(at_once, pool, bare, verb) for verb in ("bare write", "bare read")}
            found = take_turns({**ways, **over_tier(tier, pages, PAGE_BYTES, threads=THREADS)}, servers.nodes)
        for verb in ("write", "read"):
            print(row(f"{count}, {verb}", found[f"tier {verb}"], found[f"bare {verb}"], pages * PAGE_BYTES), flush=True)


def at_once(pool: ThreadPoolExecutor, lines: Sequence[dict[str, Callable[[], object]]], verb: str) -> None:
    """Every bare socket does its part at the same time."""
    list(pool.map(lambda line: line[verb](), lines))


def names_on(shard: int, shards: int, count: int) -> list[bytes]:
    """Keys whose slots a shard of `cluster` has."""
    mine = range(NUM_SLOTS * shard // shards, NUM_SLOTS * (shard + 1) // shards)
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        name = b"raw:%d" % number
        if key_slot(name) in mine:
            found.append(name)
        number += 1
    return found


def main() -> None:
    what = {"sizes": sizes, "shards": shards}[sys.argv[1]]
    for name, binary in (("Redis", find_redis_server()), ("Valkey", find_valkey_server().binary)):
        if binary:
            print(f"\n{name}\n")
            what(binary)


if __name__ == "__main__":
    main()
