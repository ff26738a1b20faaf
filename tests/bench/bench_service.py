"""The daemon from its clients' side: `python tests/bench/bench_service.py [--json FILE]`.

    lookup        one client over the unix socket: round trips of a lookup, by length of the prompt
    leases        prepare_load + complete per second
    shared        save and load of pages through shared memory, over memcpy of the same bytes in this process
    remote        GET and PUT of pages over loopback, over a bare socket's loopback in the same run
    clients       64 clients at once: round trips per second, and the time of one

Ratios are taken within one run, medians of several; every number is for this machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.lab.machine import machine
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client import RemoteStore
from kvstore.service.connect import connect
from radix.namespace import Namespace

BLOCK = 16
PAGE_BYTES = 2 << 20
NUM_SLOTS = 160
BATCH = 32  # pages per save or load
ROUNDS = 7
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


def copies(store: RemoteStore, *, remote: bool) -> dict[str, float]:
    """GB/s of saving and loading batches of pages, as an engine sees it."""
    pages = np.random.default_rng(0).integers(0, 256, (BATCH, PAGE_BYTES), np.uint8)
    target = np.zeros_like(pages)
    saves, loads, memcpys = [], [], []
    for seed in range(ROUNDS):
        request = store.request(tokens(BATCH, 100 + seed))

        def save(request: Any = request) -> None:
            lease = store.prepare_save(request, 0, BATCH)
            assert len(lease.pages) == BATCH
            for page in lease.pages:
                np.copyto(store.slot_array(page.slot), pages[page.block])
            store.complete(lease)

        def load(request: Any = request) -> None:
            lease = store.prepare_load(request, BATCH)
            assert store.wait(lease, 30.0).num_blocks == BATCH
            for page in lease.pages:
                np.copyto(target[page.block], store.slot_array(page.slot))
            store.complete(lease)

        saves.append(timed(save))
        loads.append(timed(load))
        memcpys.append(timed(lambda: np.copyto(target, pages)))
        assert np.array_equal(pages[-1], target[-1])
        store.forget(request)
    total = BATCH * PAGE_BYTES / 1e9
    result = {
        "save_gb_s": round(total / statistics.median(saves[1:]), 2),
        "load_gb_s": round(total / statistics.median(loads[1:]), 2),
    }
    if not remote:
        memcpy = total / statistics.median(memcpys[1:])
        result["memcpy_gb_s"] = round(memcpy, 2)
        result["save_over_memcpy"] = round(result["save_gb_s"] / memcpy, 2)
        result["load_over_memcpy"] = round(result["load_gb_s"] / memcpy, 2)
    return result


LOOPBACK_SERVER = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    data = memoryview(bytearray(2 << 20))
    with server.accept()[0] as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            command = one.recv(1)
            if not command: break
            if command == b"G":
                for _ in range(32): one.sendall(data)
            else:
                left = 32 * len(data)
                while left: left -= one.recv_into(data[:min(left, len(data))])
                one.sendall(b"k")
"""


def loopback() -> dict[str, float]:
    """GB/s of a bare socket between two processes, both ways: the ceiling of `remote`."""
    with subprocess.Popen([sys.executable, "-c", LOOPBACK_SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        data = memoryview(bytearray(PAGE_BYTES))
        with socket.create_connection(("127.0.0.1", port)) as one:

            def get() -> None:
                one.sendall(b"G")
                left = BATCH * PAGE_BYTES
                while left:
                    left -= one.recv_into(data[: min(left, len(data))])

            def put() -> None:
                one.sendall(b"P")
                for _ in range(BATCH):
                    one.sendall(data)
                one.recv(1)

            gets = [timed(get) for _ in range(ROUNDS)]
            puts = [timed(put) for _ in range(ROUNDS)]
    total = BATCH * PAGE_BYTES / 1e9
    return {
        "get_gb_s": round(total / statistics.median(gets[1:]), 2),
        "put_gb_s": round(total / statistics.median(puts[1:]), 2),
    }


def many_clients(url: str, num_clients: int = 64, seconds: float = 3.0) -> dict[str, float]:
    """Lookups of clients in four processes, all at once."""
    code = (
        "import sys, time, threading, json\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from tests.bench.bench_service import crowd\n"
        "print(json.dumps(crowd(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", code, root, url, str(num_clients // 4), str(seconds)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kv.sock"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "kvstore", "serve", "--socket", str(path)]
        command += ["--set", f"host.capacity_bytes={NUM_SLOTS * PAGE_BYTES}", "--set", f"service.http_port={port}"]
        with subprocess.Popen(command) as daemon:
            try:
                while not path.exists() and daemon.poll() is None:
                    time.sleep(0.05)
                time.sleep(0.5)
                result = measure(f"unix://{path}", f"http://127.0.0.1:{port}")
            finally:
                daemon.terminate()
    result["machine"] = machine()
    text = json.dumps(result, indent=2, default=str)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text)


def measure(local_url: str, remote_url: str) -> dict[str, Any]:
    """All of it."""
    result: dict[str, Any] = {"cpus": os.cpu_count()}
    with connect(local_url, LAYOUT, NAMESPACE, call_timeout_s=10.0) as store:
        result["lookup"] = lookups(store)
        result["leases"] = leases(store)
        result["shared"] = copies(store, remote=False)
    with connect(remote_url, LAYOUT, NAMESPACE, call_timeout_s=10.0, staging_bytes=64 * PAGE_BYTES) as store:
        ceiling = loopback()
        remote = copies(store, remote=True)
        remote["loopback_get_gb_s"], remote["loopback_put_gb_s"] = ceiling["get_gb_s"], ceiling["put_gb_s"]
        remote["get_over_loopback"] = round(remote["load_gb_s"] / ceiling["get_gb_s"], 2)
        remote["put_over_loopback"] = round(remote["save_gb_s"] / ceiling["put_gb_s"], 2)
        result["remote"] = remote
    result["clients"] = many_clients(local_url)
    return result


if __name__ == "__main__":
    main()
