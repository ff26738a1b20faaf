"""How long the one lock is held, and how long the garbage collector stops everything, with a large catalog.

    python tests/bench/bench_locks.py [--blocks 1000000] [--prompt 16384] [--json FILE]

A store is filled; then one thread serves short prompts while another saves, loads, finishes and forgets long ones.
For each verb the longest and the median hold are told, in CPU milliseconds of the thread that held it, and the longest
full collections. CPU time, since a machine that is busy with other things says nothing about the lock.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
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


class TimedLock:
    """The dispatcher's lock, with a note of how long each verb held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.holds: dict[str, list[float]] = defaultdict(list)

    def acquire(self, *args: Any) -> bool:
        is_held = self._lock.acquire(*args)
        if is_held:  # a condition asks in vain, to see that somebody holds it
            self._began = time.thread_time()
        return is_held

    def release(self) -> None:
        self.holds[getattr(VERB, "name", "background")].append(time.thread_time() - self._began)
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def timed(store: LocalStore) -> TimedLock:
    """Put a timed lock into a store that nobody uses yet."""
    lock = TimedLock()
    dispatcher = store._dispatcher
    dispatcher.lock = store._lock = store.admin._lock = lock  # type: ignore[assignment]
    dispatcher._changed = threading.Condition(lock)  # type: ignore[arg-type]
    return lock


def call(name: str, verb: Any, *args: Any) -> Any:
    VERB.name = name
    try:
        return verb(*args)
    finally:
        VERB.name = "background"


def request(store: LocalStore, rng: np.random.Generator, num_blocks: int) -> Request:
    raw = rng.bytes(32 * num_blocks)
    return store.request_from_hashes([raw[i : i + 32] for i in range(0, len(raw), 32)], 16 * num_blocks + 1)


def run(num_blocks: int, prompt_blocks: int, rounds: int = 5) -> dict[str, Any]:
    """Holds by verb, pauses of full collections, and the longest short lookup, in CPU ms."""
    namespace = Namespace("bench", "r", "uint8", LAYOUT.fingerprint, 16)
    capacity = (num_blocks + 2 * prompt_blocks) * 4096
    config = Config.model_validate({"host": {"capacity_bytes": capacity}})
    with open_store(config, LAYOUT, namespace) as store:
        rng = np.random.default_rng(0)
        for _ in range(num_blocks // 1000):
            known = request(store, rng, 1000)
            store.complete(store.prepare_save(known, 0, 1000))
        lock = timed(store)
        pauses: list[float] = []
        began = [0.0]

        def note(phase: str, info: dict[str, int]) -> None:
            if phase == "start":
                began[0] = time.thread_time()
            elif info["generation"] == 2:
                pauses.append(time.thread_time() - began[0])

        gc.callbacks.append(note)
        is_over = threading.Event()

        def serve() -> None:
            own = np.random.default_rng(1)
            while not is_over.is_set():
                short = request(store, own, 64)
                call("short lookup", store.lookup, known if own.random() < 0.5 else short)
                lease = call("short prepare_save", store.prepare_save, short, 0, 64)
                call("short complete", store.complete, lease)
                call("short finished", store.finished, short)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            for _ in range(rounds):
                long = request(store, rng, prompt_blocks)
                lease = call("prepare_save", store.prepare_save, long, 0, prompt_blocks)
                call("complete of a save", store.complete, lease)
                match = call("lookup", store.lookup, long)
                loading = call("prepare_load", store.prepare_load, long, match.num_blocks)
                call("complete of a load", store.complete, loading)
                call("finished", store.finished, long)
                call("forget", store.forget, long)
                gc.collect()
            num_objects, longest = len(gc.get_objects()), max(pauses)
            call("clear", store.admin.clear)
        finally:
            is_over.set()
            thread.join()
            gc.callbacks.remove(note)
        store.check()
    holds = {
        verb: {"longest_ms": round(max(times) * 1e3, 2), "median_ms": round(statistics.median(times) * 1e3, 3)}
        for verb, times in sorted(lock.holds.items())
    }
    return {
        "blocks": num_blocks,
        "prompt_blocks": prompt_blocks,
        "holds": holds,
        "longest_full_collection_ms": round(longest * 1e3, 1),
        "objects": num_objects,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--prompt", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run(options.blocks, options.prompt)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
