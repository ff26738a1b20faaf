"""A daemon under load and faults for a long time: `python -m tests.service.soak --minutes 15 --json soak.json`.

Engines (processes of their own) look up, load, compare every byte and save. A
tormentor kills engines, freezes and kills the daemon, kills, freezes and flushes Redis, detaches and resizes tiers, and
sends nonsense. Between the rounds everything is let go, and nothing may be left: no lease, no filling slot, slots that
do not add up, no file handle more than before; and the daemon's memory may not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.ports import free_port
from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.daemons import DaemonProcess, Http, attach
from tests.helpers.stores import LAYOUT, PAGE_BYTES, load, namespace, prompt, save
from tests.helpers.waiting import wait_until

HOST_PAGES = 256
REDIS_BYTES = 16 << 20  # with what the server needs itself, for fewer pages than the engines save
NUM_ENGINES = 3
FAULT_EVERY_S = 1.5
ROUND_S = 45.0


COUNTS = struct.Struct("<qq")  # requests and loaded blocks of one engine, in a file that outlives it


def engine(socket_path: str, number: int, counts_path: str) -> None:
    """One engine. Ends when it is told to, or killed."""
    counts = os.open(counts_path, os.O_RDWR)
    num_requests, num_loaded = COUNTS.unpack(os.pread(counts, COUNTS.size, number * COUNTS.size))
    rng = random.Random(number * 7919 + os.getpid())
    store = connect(f"unix://{socket_path}", LAYOUT, namespace(), retry_max_s=0.3)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    while not stopping:
        tokens = prompt(rng.randint(1, 24), rng.randint(0, 30))
        request = store.request(tokens)
        loaded, _ = load(store, request)  # compares every byte
        save(store, request, loaded)
        store.keep.finished(request, last_turn=rng.random() < 0.1)
        num_requests, num_loaded = num_requests + 1, num_loaded + loaded
        os.pwrite(counts, COUNTS.pack(num_requests, num_loaded), number * COUNTS.size)
    store.close()


class Soak:
    """One run."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.server = LocalRedis(maxmemory_bytes=REDIS_BYTES)
        self.server.start()
        settings = (
            f"service.http_port={port}",
            f"redis.url=redis://127.0.0.1:{self.server.port}",
            "redis.timeout_s=0.3",
            "breaker.probe_max_s=2",
        )
        self.daemon = DaemonProcess(directory / "kv.sock", directory / "disk", *settings, host_pages=HOST_PAGES)
        self.counts_path = directory / "counts"
        self.counts_path.write_bytes(bytes(COUNTS.size * NUM_ENGINES))
        self.faults: dict[str, int] = {}
        self.rounds: list[dict[str, Any]] = []
        self.engines: list[subprocess.Popen[bytes]] = []
        self.rng = random.Random(1)

    def run(self, seconds: float, told: Callable[[str], None]) -> dict[str, Any]:
        """Rounds of load and faults until the time is over. Raises AssertionError if anything is left behind."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._start_engines()
            end = min(until, time.monotonic() + ROUND_S)
            while time.monotonic() < end:
                time.sleep(FAULT_EVERY_S * self.rng.random())
                self._fault()
            self._stop_engines()
            self.rounds.append(self._settled())
            told(json.dumps(self.rounds[-1]))
        code = self.daemon.terminate()
        assert code == 0, f"the daemon ended with {code}"
        return {
            "seconds": seconds,
            "requests": self.counts[0],
            "loaded_blocks": self.counts[1],
            "faults": self.faults,
            "rounds": self.rounds,
        }

    @property
    def counts(self) -> tuple[int, int]:
        """Requests and loaded blocks of all engines so far."""
        rows = list(COUNTS.iter_unpack(self.counts_path.read_bytes()))
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def close(self) -> None:
        """End everything that still runs."""
        for process in self.engines:
            process.kill()
            process.wait(30)
        self.daemon.kill()
        self.server.stop()

    def _start_engines(self) -> None:
        while len(self.engines) < NUM_ENGINES:
            self._start_engine(len(self.engines))

    def _start_engine(self, number: int) -> None:
        call = f"engine({str(self.daemon.socket)!r}, {number}, {str(self.counts_path)!r})"
        root = Path(__file__).resolve().parents[2]
        process = subprocess.Popen([sys.executable, "-c", f"from tests.service.soak import engine; {call}"], cwd=root)
        self.engines.insert(number, process)

    def _stop_engines(self) -> None:
        for process in self.engines:
            process.terminate()
        for process in self.engines:
            # The signal itself ends one that was only just starting.
            code = process.wait(30)
            assert code in (0, -signal.SIGTERM), f"an engine ended with {code}"
        self.engines.clear()

    def _fault(self) -> None:
        # Processes that die are dear: they take seconds to start again.
        faults = {
            self._freeze: 4,
            self._detach: 4,
            self._resize: 4,
            self._nonsense: 4,
            self._explain: 4,
            self._freeze_redis: 2,
            self._flush_redis: 2,
            self._kill_redis: 1,
            self._kill_engine: 1.5,
            self._kill_daemon: 0.3,
        }
        (fault,) = self.rng.choices(list(faults), list(faults.values()))
        name = fault.__name__.strip("_")
        self.faults[name] = self.faults.get(name, 0) + 1
        fault()

    def _kill_engine(self) -> None:
        number = self.rng.randrange(NUM_ENGINES)
        process = self.engines.pop(number)
        process.kill()
        process.wait(30)
        self._start_engine(number)

    def _freeze(self) -> None:
        self.daemon.signal(signal.SIGSTOP)
        time.sleep(0.3)
        self.daemon.signal(signal.SIGCONT)

    def _kill_daemon(self) -> None:
        self.daemon.kill()
        time.sleep(0.2)
        self.daemon.start()

    def _freeze_redis(self) -> None:
        self.server.freeze()
        time.sleep(0.5)
        self.server.thaw()

    def _flush_redis(self) -> None:
        with self.server.client() as client:
            client.flushall()

    def _kill_redis(self) -> None:
        self.server.kill()
        time.sleep(0.2)
        self.server.start()

    def _detach(self) -> None:
        http = Http(self.port)
        with contextlib.suppress(OSError):
            http.call("POST", "/v1/tiers/disk/detach", {})
            time.sleep(0.1)
            http.call("POST", "/v1/tiers/disk/attach", {})

    def _resize(self) -> None:
        pages = self.rng.choice([HOST_PAGES // 4, HOST_PAGES // 2, HOST_PAGES])
        with contextlib.suppress(OSError):
            Http(self.port).call("POST", "/v1/tiers/host/resize", {"capacity_bytes": pages * PAGE_BYTES})

    def _nonsense(self) -> None:
        for _ in range(5):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(self.daemon.socket))
                raw.sendall(self.rng.randbytes(self.rng.randrange(200)))

    def _explain(self) -> None:
        tokens = prompt(self.rng.randint(1, 24), self.rng.randint(0, 40)).tolist()
        with contextlib.suppress(OSError):
            Http(self.port).call("POST", "/v1/explain", {"tokens": tokens})

    def _settled(self) -> dict[str, Any]:
        """Let everything end, and see that nothing is left."""
        Http(self.port).call("POST", "/v1/tiers/disk/attach", {})  # where the last fault took it away
        with attach(self.daemon.socket) as store:
            wait_until(lambda: store.is_attached and store.stats().get("leases") == 0, "leases are left")
            wait_until(lambda: _is_still(store), "slots are left filling")
            slots = store.stats()["slots"]
            assert sum(slots.values()) == HOST_PAGES, slots
            assert store.stats()["pinned_pages"] == 0
        pid = self.daemon.process.pid
        wait_until(lambda: _open_files(pid) <= 40, f"{_open_files(pid)} file handles are open")
        return {
            "pid": pid,
            "requests": self.counts[0],
            "slots": slots,
            "files": _open_files(pid),
            "rss_mib": _rss_mib(pid),
        }


def _is_still(store: RemoteStore) -> bool:
    stats = store.stats()
    return bool(stats["slots"]["filling"] == 0 and not any(stats["owed_pages"].values()))


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(Path(directory), free_port())
        try:
            result = soak.run(60.0 * arguments.minutes, lambda line: print(line, flush=True))
        finally:
            soak.close()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
