"""A process that uses a store until it is killed, or for a while. Run by tests/fault/test_store_crash.py.

    python -m tests.fault.crash_writer save DIR PAGES JOURNAL FIRST_SEED
    python -m tests.fault.crash_writer engine DIR PAGES SECONDS SEED

`save` writes one prompt after the other and a line to the journal before each ("try SEED BLOCKS") and after every page
of it has been published on disk ("ack SEED BLOCKS"). `engine` makes requests and prints its tally as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.store import LocalStore
from tests.fault.engine import Engine
from tests.fault.faults import PROMPTS, disk_store
from tests.helpers.stores import PAGE_BYTES, prompt, save

PROMPTS_AT_ONCE = 3
FLUSH_S = 30.0
EXCLUSIVE: dict[str, Any] = {"exclusive": True, "shared": False}


def write_until_killed(store: LocalStore, journal: int, first_seed: int) -> None:
    """Save prompts for ever; what the journal acknowledges was on disk before."""
    random = np.random.default_rng(first_seed)
    while True:
        batch = [(first_seed + i, int(random.integers(1, 9))) for i in range(PROMPTS_AT_ONCE)]
        first_seed += PROMPTS_AT_ONCE
        for seed, blocks in batch:
            _note(journal, "try", seed, blocks)
            request = store.request(prompt(blocks, seed))
            save(store, request)
            store.keep.finished(request)
        flushed = store.flush(FLUSH_S)
        assert flushed, str(flushed)
        for seed, blocks in batch:
            _note(journal, "ack", seed, blocks)


def run_engine(store: LocalStore, seconds: float, seed: int) -> None:
    """Make requests for so long, then print what became of them."""
    engine = Engine(store, PROMPTS, seed=seed)
    engine.start()
    engine.run(lambda: False, limit_s=seconds)
    engine.stop()
    store.check()
    print(json.dumps({**asdict(engine.tally), "hits": store.stats()["hit_blocks"]["disk"]}))


def _note(journal: int, verb: str, seed: int, blocks: int) -> None:
    os.write(journal, f"{verb} {seed} {blocks}\n".encode())  # one call: what was written survives the process


def main() -> None:
    mode, directory, pages, *rest = sys.argv[1:]
    with ExitStack() as stack:
        disk = EXCLUSIVE if mode == "save-exclusive" else {}
        store = disk_store(stack, Path(directory), capacity_bytes=int(pages) * PAGE_BYTES, **disk)
        if mode.startswith("save"):
            write_until_killed(store, os.open(rest[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT), int(rest[1]))
        else:
            run_engine(store, float(rest[0]), int(rest[1]))


if __name__ == "__main__":
    main()
