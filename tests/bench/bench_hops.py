"""How many files of ours a verb of the store goes through, and how many calls it makes: the price of a cut.

    python tests/bench/bench_hops.py                       # this tree
    PYTHONPATH=OTHER_TREE python tests/bench/bench_hops.py # another build, to compare with; the counts are exact

One store with a host and a disk tier, a prompt of 15 blocks that is saved and a hit. The profiler counts the calls of
this thread alone, so what lanes do beside it is left out. Depth is how many of our functions stand on one another.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

PACKAGES = ("kvstore", "radix", "eviction")
BLOCK, NUM_BLOCKS, PAGE_BYTES = 16, 15, 4096


def hops(call: Callable[[], Any]) -> tuple[Any, int, list[str], int]:
    """What `call` returns; the calls of our functions in it, the files they lie in, and how deep they stand."""
    import kvstore

    root = str(Path(kvstore.__file__).parents[1]) + os.sep
    ours = tuple(root + package + os.sep for package in PACKAGES)
    files: dict[str, None] = {}
    calls = depth = deepest = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls, depth, deepest
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(ours):
            return
        if event == "return":
            depth -= 1
            return
        calls += 1
        depth += 1
        deepest = max(deepest, depth)
        files[frame.f_code.co_filename.removeprefix(root)] = None

    sys.setprofile(profile)
    try:
        found = call()
    finally:
        sys.setprofile(None)
    return found, calls, list(files), deepest


def run(directory: Path) -> list[tuple[str, int, list[str], int]]:
    """Verb, calls, files, depth."""
    from kvstore import Config, Layout, Namespace, open_store
    from kvstore.layout import GroupKind, LayerGroup

    layout = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), PAGE_BYTES),), "hops", "uint8")
    namespace = Namespace("hops", "1", layout.dtype, layout.fingerprint, BLOCK)
    config = Config(host={"capacity_bytes": "4MiB"}, disk={"path": directory, "capacity_bytes": "16MiB"})
    rows = []

    def measure(verb: str, call: Callable[[], Any]) -> Any:
        found, calls, files, depth = hops(call)
        rows.append((verb, calls, files, depth))
        return found

    with open_store(config, layout, namespace) as store:
        for number in range(2):  # the first round imports what is imported late
            rows.clear()
            tokens = np.arange(NUM_BLOCKS * BLOCK + 1, dtype=np.int64) + number * 1_000_000
            request = store.request(tokens)
            store.lookup(request)
            save = measure("prepare_save", lambda request=request: store.prepare_save(request, 0, NUM_BLOCKS))
            measure("complete of a save", lambda save=save: store.complete(save))
            store.keep.finished(request)
            store.flush(10.0)
            request = store.request(tokens)
            match = measure("lookup, a hit in host memory", lambda request=request: store.lookup(request))
            assert match.num_blocks == NUM_BLOCKS
            lease = measure("prepare_load", lambda request=request: store.prepare_load(request, NUM_BLOCKS))
            slot = lease.pages[0].slot
            measure("slot_array", lambda slot=slot: store.slots.array(slot))
            measure("complete of a load", lambda lease=lease: store.complete(lease))
            measure("finished", lambda request=request: store.keep.finished(request))
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        for verb, calls, files, depth in run(Path(path)):
            print(f"{verb:30} {calls:4} calls {len(files):3} files, depth {depth:2}  {' '.join(files)}")
