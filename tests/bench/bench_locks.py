"""How long the one lock is held, how long a lookup of others waits meanwhile, and what the garbage collector stops.

    python tests/bench/bench_locks.py [--blocks 200000 1000000] [--prompt 16384] [--json FILE]
    PYTHONPATH=OTHER_TREE python tests/bench/bench_locks.py ...     # another build, to compare with

A store is filled; then one thread serves short prompts while another calls every verb with long ones. Told for each
verb: how often it took the lock, its longest hold in CPU and wall milliseconds, and the longest short lookup that
others made meanwhile, with its waiting. What the collector took of a hold is left out: it comes whenever it likes, and
stops all threads anyway. CPU time says what the code does; wall time also what else the machine was busy with.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from kvstore import Config, open_store
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import Request
from kvstore.store import LocalStore
from radix.namespace import Namespace

LAYOUT = Layout(16, (LayerGroup(GroupKind.FULL, (0,), 4096),), "bench", "uint8")
VERB = threading.local()
BACKGROUND = "background"
EXPIRING = 8  # long prompts whose times to live end at once


def collecting_s() -> float:
    """CPU time that this thread has spent in the garbage collector."""
    spent: float = getattr(VERB, "collecting_s", 0.0)
    return spent


class TimedLock:
    """The dispatcher's lock, with a note of how long each verb held it: CPU and wall seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.holds: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def acquire(self, *args: Any) -> bool:
        is_held = self._lock.acquire(*args)
        if is_held:  # a condition asks in vain, to see that somebody holds it
            self._began = time.thread_time() - collecting_s(), time.perf_counter()
        return is_held

    def release(self) -> None:
        cpu, wall = self._began
        hold = time.thread_time() - collecting_s() - cpu, time.perf_counter() - wall
        self.holds[getattr(VERB, "name", BACKGROUND)].append(hold)
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Waits:
    """The longest short lookup during each verb of the other thread."""

    def __init__(self) -> None:
        self.now = ""  # the verb that is being called
        self.longest: dict[str, float] = defaultdict(float)

    def lookup(self, store: LocalStore, request: Request) -> None:
        verb, began = self.now, time.perf_counter()
        call("short lookup", store.lookup, request)
        self.longest[verb] = max(self.longest[verb], time.perf_counter() - began)


def timed(store: LocalStore) -> TimedLock:
    """Put a timed lock into a store that nobody uses yet."""
    lock = TimedLock()
    dispatcher = store._dispatcher
    dispatcher.lock = store._lock = store.admin._lock = lock  # type: ignore[assignment]
    dispatcher._changed = threading.Condition(lock)  # type: ignore[arg-type]
    return lock


def call(name: str, verb: Any, *args: Any, **kwargs: Any) -> Any:
    VERB.name = name
    try:
        return verb(*args, **kwargs)
    finally:
        VERB.name = BACKGROUND


def request(store: LocalStore, rng: np.random.Generator, num_blocks: int) -> Request:
    raw = rng.bytes(32 * num_blocks)
    return store.request_from_hashes([raw[i : i + 32] for i in range(0, len(raw), 32)], 16 * num_blocks + 1)


def serve(store: LocalStore, known: Request, waits: Waits, is_over: threading.Event) -> None:
    """Short prompts, one after the other."""
    rng = np.random.default_rng(1)
    while not is_over.is_set():
        short = request(store, rng, 64)
        waits.lookup(store, known if rng.random() < 0.5 else short)
        lease = call("short prepare_save", store.prepare_save, short, 0, 64)
        call("short complete", store.complete, lease)
        waits.lookup(store, short)
        call("short finished", store.keep.finished, short)


def call_all(store: LocalStore, rng: np.random.Generator, num_blocks: int, waits: Waits, rounds: int) -> None:
    """Every verb with long prompts."""

    def long_call(name: str, verb: Any, *args: Any, **kwargs: Any) -> Any:
        waits.now = name
        try:
            return call(name, verb, *args, **kwargs)
        finally:
            waits.now = ""

    for _ in range(rounds):
        long = request(store, rng, num_blocks)
        lease = long_call("prepare_save", store.prepare_save, long, 0, num_blocks)
        long_call("release of a save", store.release, lease)
        lease = long_call("prepare_save", store.prepare_save, long, 0, num_blocks)
        long_call("complete of a save", store.complete, lease)
        match = long_call("lookup", store.lookup, long)
        for end in ("complete", "release"):
            loading = long_call("prepare_load", store.prepare_load, long, match.num_blocks)
            long_call(f"{end} of a load", getattr(store, end), loading)
        store.prepare_load(long, match.num_blocks, owner="engine")
        long_call("release_owner", store.release_owner, "engine")
        ticket = long_call("prefetch", store.prefetch, long)
        long_call("cancel", store.cancel, ticket)
        long_call("pin", store.keep.pin, long)
        long_call("unpin", store.keep.unpin, long)
        long_call("set_ttl", store.keep.set_ttl, long, 3600.0)
        long_call("finished", store.keep.finished, long)
        long_call("finished, last turn", store.keep.finished, long, last_turn=True)
        long_call("abandon", store.abandon, long)
        long_call("forget", store.keep.forget, long)
    for _ in range(EXPIRING):
        long = request(store, rng, num_blocks)
        store.complete(store.prepare_save(long, 0, num_blocks))
        store.keep.set_ttl(long, 2.0)
    waits.now = f"{EXPIRING * num_blocks} pages expire"
    until = time.monotonic() + 6.0
    while time.monotonic() < until:
        time.sleep(0.1)
    long_call("clear", store.admin.clear)


def run(num_blocks: int, prompt_blocks: int, rounds: int = 5) -> dict[str, Any]:
    """Holds by verb, the longest lookups meanwhile, and pauses of full collections, in ms."""
    namespace = Namespace("bench", "r", "uint8", LAYOUT.fingerprint, 16)
    capacity = (num_blocks + (EXPIRING + 2) * prompt_blocks) * 4096
    config = Config.model_validate({"host": {"capacity_bytes": capacity}})
    with open_store(config, LAYOUT, namespace) as store:
        rng = np.random.default_rng(0)
        for _ in range(num_blocks // 1000):
            known = request(store, rng, 1000)
            store.complete(store.prepare_save(known, 0, 1000))
        lock, waits = timed(store), Waits()
        pauses: list[float] = []
        began = [0.0]

        def note(phase: str, info: dict[str, int]) -> None:
            if phase == "start":
                began[0] = time.thread_time()
                return
            pause = time.thread_time() - began[0]
            VERB.collecting_s = collecting_s() + pause
            if info["generation"] == 2:
                pauses.append(pause)

        gc.callbacks.append(note)
        is_over = threading.Event()
        thread = threading.Thread(target=serve, args=(store, known, waits, is_over))
        thread.start()
        try:
            gc.collect()
            num_objects = len(gc.get_objects())
            call_all(store, rng, prompt_blocks, waits, rounds)
        finally:
            is_over.set()
            thread.join()
            gc.callbacks.remove(note)
        call("check", store.check)
    del lock.holds["check"]  # for tests
    holds = {
        verb: {
            "holds": len(times),
            "longest_cpu_ms": round(max(cpu for cpu, _ in times) * 1e3, 2),
            "longest_wall_ms": round(max(wall for _, wall in times) * 1e3, 2),
            "longest_lookup_ms": round(waits.longest[verb] * 1e3, 2) if verb in waits.longest else None,
        }
        for verb, times in sorted(lock.holds.items())
    }
    return {
        "blocks": num_blocks,
        "prompt_blocks": prompt_blocks,
        "holds": holds,
        "longest_lookup_while_pages_expire_ms": round(
            max(wait for verb, wait in waits.longest.items() if verb.endswith("expire")) * 1e3, 2
        ),
        "longest_full_collection_ms": round(max(pauses) * 1e3, 1),
        "objects": num_objects,
    }


def table(result: dict[str, Any]) -> str:
    """The same to read."""
    lines = [
        f"{result['blocks']} blocks in the catalog, prompts of {result['prompt_blocks']}",
        "| verb | holds | longest hold, CPU ms | wall ms | longest lookup meanwhile, ms |",
        "|---|---|---|---|---|",
    ]
    for verb, told in result["holds"].items():
        meanwhile = "" if told["longest_lookup_ms"] is None else told["longest_lookup_ms"]
        lines.append(
            f"| {verb} | {told['holds']} | {told['longest_cpu_ms']} | {told['longest_wall_ms']} | {meanwhile} |"
        )
    lines.append(f"longest lookup while pages expire: {result['longest_lookup_while_pages_expire_ms']} ms")
    lines.append(f"longest full collection: {result['longest_full_collection_ms']} ms, {result['objects']} objects")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--prompt", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for num_blocks in options.blocks:
        results.append(run(num_blocks, options.prompt))
        print(table(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
