"""Redis tier against a bare socket to the same server: wall time, client and server CPU, and the cost of a lookup.

    python tests/bench/bench_redis.py --json redis.json

A private server is started. For each page size and connection (TCP, unix socket) the cases take turns, so that noise
hits all alike; figures are medians over rounds, ratios are against the bare socket of the same round.

    bare          SET and GET of one value of the page's length, out of and into a slot; no header, no checksum
    bare + xxh3   the same, and the checksum that a page which leaves host memory must have
    tier          write_from and read_into of a batch, one connection: header, checksum, parts, expiry
    redis-py      what one gets without the tier: set(), and get() copied into the slot
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import redis
import xxhash

from kvstore.lab.machine import machine, versions
from kvstore.lab.workloads.redis import BareSocket
from kvstore.page import PageMeta, page_key
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.host import HostSlab
from kvstore.tiers.redis.tier import RedisTier
from kvstore.tiers.redis.url import parse_redis_url

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
PAGE_SIZES = (256 * KiB, MiB, 2 * MiB, 4 * MiB)
LOOKUP_KEYS = (256, 1024)
TIMEOUT_S = 60.0
Work = Callable[[], None]


def run(*, rounds: int = 7, total_bytes: int = 64 * MiB) -> dict[str, Any]:
    """Measure everything; `total_bytes` is what each case moves in a round."""
    with LocalRedis(maxmemory_bytes=8 * total_bytes) as server:
        info: Any = server.client().info("server")
        transports = {"tcp": server.url, "unix": server.unix_url}
        pages = [
            {"connection": name, "page_bytes": page_bytes, **_pages(server, url, page_bytes, total_bytes, rounds)}
            for name, url in transports.items()
            for page_bytes in PAGE_SIZES
        ]
        lookups = [
            {"connection": name, "keys": count, **_lookups(url, count, rounds * 10)}
            for name, url in transports.items()
            for count in LOOKUP_KEYS
        ]
    return {
        "machine": machine(),
        "versions": {**versions(), "redis-server": info["redis_version"]},
        "rounds": rounds,
        "bytes_per_round": total_bytes,
        "pages": pages,
        "lookups": lookups,
    }


def main() -> None:
    """Run and print; with --json also write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=64, help="MiB each case moves in a round")
    options = parser.parse_args()
    results = run(rounds=options.rounds, total_bytes=options.mib * MiB)
    for row in results["pages"]:
        for verb in ("write", "read"):
            for case, figures in row[verb].items():
                print(
                    f"{row['connection']:4} {row['page_bytes'] // KiB:5} KiB {verb:5} {case:12} "
                    f"{figures['gb_per_s']:6.2f} GB/s  {figures['ratio']:5.2f} of bare  CPU ms/GiB: "
                    f"client {figures['client_cpu_ms_per_gib']:5.0f} server {figures['server_cpu_ms_per_gib']:5.0f}"
                )
    for row in results["lookups"]:
        print(f"{row['connection']:4} {row['keys']:5} keys contains {row['us_per_key']:6.2f} us/key", end=" ")
        print(f"(client CPU {row['client_cpu_us_per_key']:.2f}), bare pipeline {row['bare_us_per_key']:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _pages(server: LocalRedis, url: str, page_bytes: int, total_bytes: int, rounds: int) -> dict[str, Any]:
    count = max(1, total_bytes // page_bytes)
    keys = [page_key(os.urandom(32)) for _ in range(count)]
    metas = [PageMeta(page_bytes)] * count
    names = [b"bare" + key for key in keys]
    with ExitStack() as stack:
        slab = stack.enter_context(closing(HostSlab(count, page_bytes)))
        bare = stack.enter_context(closing(BareSocket(parse_redis_url(url))))
        tier = stack.enter_context(closing(RedisTier(url, slot_bytes=page_bytes, ttl_s=600, connections=1)))
        plain: Any = stack.enter_context(closing(redis.Redis.from_url(url, protocol=2)))
        slab.buffer[:] = np.random.default_rng(0).integers(0, 256, slab.buffer.size, dtype=np.uint8)
        views = [slab.view(i) for i in range(count)]
        slots = [np.frombuffer(view, np.uint8) for view in views]

        def bare_write() -> None:
            for name, view in zip(names, views, strict=True):
                bare.set(name, view)

        def bare_write_checked() -> None:
            for name, view in zip(names, views, strict=True):
                xxhash.xxh3_64_intdigest(view)
                bare.set(name, view)

        def bare_read() -> None:
            for name, view in zip(names, views, strict=True):
                bare.get_into(name, view)

        def bare_read_checked() -> None:
            for name, view in zip(names, views, strict=True):
                bare.get_into(name, view)
                xxhash.xxh3_64_intdigest(view)

        def tier_write() -> None:
            _expect(tier.write_from(keys, views, metas, timeout_s=TIMEOUT_S))

        def tier_read() -> None:
            _expect(tier.read_into(keys, views, metas, timeout_s=TIMEOUT_S))

        def plain_write() -> None:
            for name, view in zip(names, views, strict=True):
                plain.set(name, view)

        def plain_read() -> None:
            for name, slot in zip(names, slots, strict=True):
                np.copyto(slot, np.frombuffer(plain.get(name), np.uint8))

        def forget() -> None:
            tier.delete(keys, timeout_s=TIMEOUT_S)
            bare.delete(names)

        def store() -> None:
            forget()
            bare_write()
            tier_write()

        writes: dict[str, Work] = {
            "bare": bare_write,
            "bare + xxh3": bare_write_checked,
            "tier": tier_write,
            "redis-py": plain_write,
        }
        reads: dict[str, Work] = {
            "bare": bare_read,
            "bare + xxh3": bare_read_checked,
            "tier": tier_read,
            "redis-py": plain_read,
        }
        num_bytes = count * page_bytes
        written = _take_turns(server.pid, writes, num_bytes, rounds, before=forget)
        store()
        read = _take_turns(server.pid, reads, num_bytes, rounds, before=lambda: None)
        forget()
    return {"write": written, "read": read}


def _take_turns(pid: int, cases: dict[str, Work], num_bytes: int, rounds: int, before: Work) -> dict[str, Any]:
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, work in cases.items():
            before()
            start = time.perf_counter(), time.process_time(), _cpu_s(pid)
            work()
            end = time.perf_counter(), time.process_time(), _cpu_s(pid)
            if number:  # the first round connects and warms caches
                spent[name].append((end[0] - start[0], end[1] - start[1], end[2] - start[2]))
    return {
        name: {
            "gb_per_s": num_bytes / median(wall for wall, _, _ in turns) / 1e9,
            "ratio": median(bare[0] / own[0] for bare, own in zip(spent["bare"], turns, strict=True)),
            "client_cpu_ms_per_gib": median(cpu for _, cpu, _ in turns) / num_bytes * GiB * 1e3,
            # The kernel counts a process in ticks of 10 ms: only the sum over rounds says something.
            "server_cpu_ms_per_gib": sum(cpu for _, _, cpu in turns) / len(turns) / num_bytes * GiB * 1e3,
        }
        for name, turns in spent.items()
    }


def _lookups(url: str, count: int, rounds: int) -> dict[str, float]:
    keys = [page_key(os.urandom(32)) for _ in range(count)]
    names = [b"kv" + key for key in keys]
    with (
        closing(RedisTier(url, slot_bytes=MiB, ttl_s=600, connections=1)) as tier,
        closing(BareSocket(parse_redis_url(url))) as bare,
    ):
        tier_s: list[float] = []
        bare_s: list[float] = []
        cpu_s = 0.0
        for number in range(rounds + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            tier.contains(keys, timeout_s=TIMEOUT_S)
            between, cpu_end = time.perf_counter(), time.process_time()
            bare.exists(names)
            if number:
                tier_s.append(between - start)
                bare_s.append(time.perf_counter() - between)
                cpu_s += cpu_end - cpu_start
    return {
        "us_per_key": median(tier_s) / count * 1e6,
        "client_cpu_us_per_key": cpu_s / rounds / count * 1e6,
        "bare_us_per_key": median(bare_s) / count * 1e6,
    }


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _expect(answers: Sequence[bool]) -> None:
    if not all(answers):
        raise RuntimeError(f"{answers.count(False)} of {len(answers)} pages were refused or lost")


if __name__ == "__main__":
    main()
