"""How fast pages go between an engine and a daemon, beside what the machine can do with the same bytes.

    python -m tests.bench.bench_service_bytes [--json FILE] [--rounds 31] [--page-kib 2048]

The ceiling is memcpy between memory of the same kinds, a page at a time.

Slots are of the same kind everywhere and were touched before. Those of the ceiling are as many as the store's and used
in turn like them, so that neither lives in a cache. Cases take turns; ratios are medians over rounds. CPU ms per GB are
those of this process and of the other one: on a machine with neighbours they say more than the time does, and where
both work at once, the larger one bounds the speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table
from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.machine import machine, versions
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import Request
from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.tiers.host import HostSlab
from kvstore.units import KiB, MiB
from radix.namespace import Namespace

BLOCK = 16
BATCH_BYTES = 64 * MiB  # of a save or load
NUM_BATCHES = 4  # that the store keeps, used in turn
PIECES = 64  # of a page in the engine's memory: keys and values of 32 layers
ROUNDS = 31
TIMEOUT_S = 30.0

Slots = Sequence[npt.NDArray[np.uint8]]
Copy = Callable[[Slots], object]


class Engine:
    """Memory of an engine for one batch of pages, and its two ways of copying."""

    def __init__(self, page_bytes: int) -> None:
        self.num_pages = BATCH_BYTES // page_bytes
        self._pages = np.random.default_rng(0).integers(0, 256, (self.num_pages, page_bytes), np.uint8)
        self._table = paged_table(list(self._pages.reshape(PIECES, self.num_pages, -1)))
        self._device = CpuDevice()

    def copy_out(self, slots: Slots) -> None:
        """Save into slots, a page at a time."""
        for slot, page in zip(slots, self._pages, strict=True):
            np.copyto(slot, page)

    def copy_in(self, slots: Slots) -> None:
        """Load from slots, a page at a time."""
        for slot, page in zip(slots, self._pages, strict=True):
            np.copyto(page, slot)

    def gather(self, slots: Slots) -> None:
        """Save as the connectors do: one call, from all of the engine's tensors."""
        self._device.copy_out(self._table, range(self.num_pages), slots).wait()

    def scatter(self, slots: Slots) -> None:
        """Load as the connectors do."""
        self._device.copy_in(self._table, range(self.num_pages), slots).wait()


class Client:
    """A store that is filled, and whole saves and loads of a batch."""

    def __init__(self, store: RemoteStore, num_pages: int) -> None:
        self._store = store
        self._num_pages = num_pages
        self._tokens = count(0, num_pages * BLOCK)
        self._stored: list[Request] = []  # least recently used first
        for _ in range(NUM_BATCHES):
            self.new_prompt()
            self.save(copy_nothing)

    def new_prompt(self) -> None:
        """Make the prompt that is saved next; hashing it is the engine's affair, however its pages are kept."""
        start = next(self._tokens)
        # One token more than the pages hold: an engine has to compute at least one.
        self._fresh = self._store.request(np.arange(start, start + self._num_pages * BLOCK + 1, dtype=np.uint32))

    def save(self, copy: Copy) -> None:
        """Lease, copy, complete."""
        lease = self._store.prepare_save(self._fresh, 0, self._num_pages)
        if len(lease.pages) != self._num_pages:
            raise RuntimeError(f"{len(lease.pages)} of {self._num_pages} pages found a slot")
        copy([self._store.slot_array(page.slot) for page in lease.pages])
        self._store.complete(lease)
        self._stored = [*self._stored, self._fresh][-NUM_BATCHES:]

    def load(self, copy: Copy) -> None:
        """Lookup, lease, copy, complete."""
        self._stored = [*self._stored[1:], self._stored[0]]
        match = self._store.lookup(self._stored[-1])
        lease = self._store.prepare_load(self._stored[-1], match.num_blocks)
        if self._store.wait(lease, TIMEOUT_S).num_blocks != self._num_pages:
            raise RuntimeError(f"{len(lease.pages)} of {self._num_pages} pages were found again")
        copy([self._store.slot_array(page.slot) for page in lease.pages])
        self._store.complete(lease)

    def slots(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Slots of the daemon that are this client's for good, in turn."""
        num_blocks = NUM_BATCHES * self._num_pages
        request = self._store.request(np.full(num_blocks * BLOCK + 1, 1 << 31, np.uint32))
        lease = self._store.prepare_save(request, 0, num_blocks)
        return cycle([self._store.slot_array(page.slot) for page in lease.pages])


def copy_nothing(slots: Slots) -> None:
    """Leave the slots as they are."""


def shared(store: RemoteStore, daemon: int, page_bytes: int, rounds: int) -> list[Table]:
    """Save and load through shared memory. daemon: its process."""
    engine = Engine(page_bytes)
    num_pages = engine.num_pages
    client = Client(store, num_pages)
    theirs = client.slots()
    with closing(HostSlab(NUM_BATCHES * num_pages, page_bytes, shared_name="bench")) as slab:
        own = cycle(map(slab.array, range(slab.num_slots)))

        def table(verb: str, move: Callable[[Copy], None], copy: Copy, in_one_call: Copy) -> Table:
            def case(name: str, run: Callable[[], object]) -> Case:
                return Case(name, run, BATCH_BYTES, client.new_prompt, daemon)

            cases = [
                Case("memcpy", lambda: copy(list(islice(own, num_pages))), BATCH_BYTES),
                case("copy alone", lambda: copy(list(islice(theirs, num_pages)))),
                case("lease alone", partial(move, copy_nothing)),
                case("lease and copy", partial(move, copy)),
                case("lease and copy in one call", partial(move, in_one_call)),
            ]
            title = f"{verb} {num_pages} pages of {page_bytes // KiB} KiB through shared memory"
            return measure(title, "bytes", cases, rounds=rounds)

        return [
            table("save", client.save, engine.copy_out, engine.gather),
            table("load", client.load, engine.copy_in, engine.scatter),
        ]


@contextmanager
def daemon_process(capacity_bytes: int, *settings: str) -> Iterator[tuple[str, int]]:
    """A daemon: its URL, its process. settings: as for `kvstore serve --set`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kv.sock"
        command = [sys.executable, "-m", "kvstore", "serve", "--socket", str(path)]
        command += ["--set", f"host.capacity_bytes={capacity_bytes}", "--set", "service.http_port=none"]
        command += [part for setting in settings for part in ("--set", setting)]
        with subprocess.Popen(command) as daemon:
            try:
                while not path.exists() and daemon.poll() is None:
                    time.sleep(0.05)
                time.sleep(0.5)
                yield f"unix://{path}", daemon.pid
            finally:
                daemon.terminate()


def run(*, page_kib: int, rounds: int) -> dict[str, Any]:
    """Measure pages of `page_kib` KiB."""
    page_bytes = page_kib * KiB
    layout = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), page_bytes),), "bench", "uint8")
    namespace = Namespace("bench", "1", "uint8", layout.fingerprint, BLOCK)
    # Those stored, those the client keeps, and one that is being saved.
    with (
        daemon_process((2 * NUM_BATCHES + 1) * BATCH_BYTES) as (url, daemon),
        connect(url, layout, namespace, call_timeout_s=TIMEOUT_S) as store,
    ):
        tables = shared(store, daemon, page_bytes, rounds)
    return {"machine": machine(), "versions": versions(), "tables": [as_dict(table) for table in tables]}


def as_dict(table: Table) -> dict[str, Any]:
    """A table for JSON."""
    return {
        "name": table.name,
        "cases": [
            {
                "case": timing.name,
                "gb_per_s": timing.per_s / 1e9,
                "ratio": timing.ratio,
                "cpu_s_per_gb": timing.cpu_s / timing.amount * 1e9,
                "partner_cpu_s_per_gb": (timing.partner_cpu_s or 0.0) / timing.amount * 1e9,
            }
            for timing in table.timings
        ],
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for table in result["tables"]:
        print(f"\n{table['name']:54}  GB/s  of the first   CPU ms/GB here + there")
        for case in table["cases"]:
            print(
                f"  {case['case']:50} {case['gb_per_s']:7.2f} {case['ratio']:10.2f} "
                f"{case['cpu_s_per_gb'] * 1e3:14.0f} + {case['partner_cpu_s_per_gb'] * 1e3:.0f}"
            )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--page-kib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    result = run(page_kib=arguments.page_kib, rounds=arguments.rounds)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
