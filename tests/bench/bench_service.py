"""The daemon from its clients' side: `python -m tests.bench.bench_service [--json FILE]`.

    lookup        one client over the unix socket: round trips of a lookup, by length of the prompt
    leases        prepare_load + complete per second
    clients       64 clients at once: round trips per second, and the time of one
    save, load    through shared memory: bench_service_bytes.py

Ratios are taken within one run, medians of several; every number is for this machine only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.units import KiB, MiB
from radix.namespace import Namespace
from tests.bench import bench_service_bytes

BLOCK = 16
PAGE_BYTES = 2 * MiB
NUM_SLOTS = 160
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), PAGE_BYTES),), "bench", "uint8")
NAMESPACE = Namespace("bench", "1", "uint8", LAYOUT.fingerprint, BLOCK)


def tokens(num_blocks: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, 50_000, num_blocks * BLOCK + 1)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def lookups(store: RemoteStore) -> dict[str, Any]:
    """Round trips in µs, by blocks of the prompt."""
    result = {}
    for num_blocks in (16, 128, 1024):
        request = store.request(tokens(num_blocks, 1))
        store.lookup(request)
        seconds = [timed(lambda: store.lookup(request)) for _ in range(2000)]  # noqa: B023 - called at once
        first = []
        for seed in range(200):
            new = store.request(tokens(num_blocks, 1000 + seed))
            first.append(timed(lambda: store.lookup(new)))  # noqa: B023
            store.finished(new)
        cut = np.percentile(np.array(seconds) * 1e6, [50, 99])
        result[f"{num_blocks} blocks"] = {
            "p50_us": round(float(cut[0]), 1),
            "p99_us": round(float(cut[1]), 1),
            "first_p50_us": round(statistics.median(first) * 1e6, 1),
        }
    return result


def leases(store: RemoteStore) -> dict[str, float]:
    """Load leases of 16 resident pages per second, with their end."""
    request = store.request(tokens(16, 2))
    save = store.prepare_save(request, 0, 16)
    store.complete(save)

    def one() -> None:
        store.complete(store.prepare_load(request, 16))

    seconds = [timed(one) for _ in range(1000)]
    return {"per_s": round(1 / statistics.median(seconds)), "p50_us": round(statistics.median(seconds) * 1e6, 1)}


def many_clients(url: str, num_clients: int = 64, seconds: float = 3.0) -> dict[str, float]:
    """Lookups of clients in four processes, all at once."""
    code = (
        "import sys, json; from tests.bench.bench_service import crowd; "
        "print(json.dumps(crowd(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))"
    )
    command = [sys.executable, "-c", code, url, str(num_clients // 4), str(seconds)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)]
    results = [json.loads(process.communicate()[0]) for process in processes]
    return {
        "clients": num_clients,
        "lookups_per_s": round(sum(result["count"] for result in results) / seconds),
        "p50_us": round(statistics.median(result["p50_us"] for result in results), 1),
        "p99_us": round(max(result["p99_us"] for result in results), 1),
        "misses": sum(result["misses"] for result in results),
    }


def crowd(url: str, num_clients: int, seconds: float) -> dict[str, float]:
    """Clients with a thread each, in this process."""
    taken: list[float] = []
    misses = [0]

    def run() -> None:
        with connect(url, LAYOUT, NAMESPACE, call_timeout_s=10.0) as store:
            request = store.request(tokens(16, 2))
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                began = time.perf_counter()
                match = store.lookup(request)
                taken.append(time.perf_counter() - began)
                misses[0] += match.num_blocks != 16

    threads = [threading.Thread(target=run) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cut = np.percentile(np.array(taken) * 1e6, [50, 99])
    return {"count": len(taken), "p50_us": float(cut[0]), "p99_us": float(cut[1]), "misses": misses[0]}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=bench_service_bytes.ROUNDS, help="of saves and loads")
    arguments = parser.parse_args()
    result = calls()
    print(json.dumps(result, indent=2))
    result |= bench_service_bytes.run(page_kib=PAGE_BYTES // KiB, rounds=arguments.rounds)
    bench_service_bytes.show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def calls() -> dict[str, Any]:
    """What moves no bytes."""
    with bench_service_bytes.daemon_process(NUM_SLOTS * PAGE_BYTES) as (url, _):
        with connect(url, LAYOUT, NAMESPACE, call_timeout_s=10.0) as store:
            result = {"lookup": lookups(store), "leases": leases(store)}
        return {**result, "clients": many_clients(url)}


if __name__ == "__main__":
    main()
