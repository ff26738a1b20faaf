"""Save and load through a whole store whose only tier is host memory, over memcpy of the same bytes.

Saving copies engine memory into slots of a lease, loading copies them out again, by the device that connectors use:
what is above memcpy is the store's own cost. The engine's memory lies 16 bytes off a page, as numpy and malloc give it;
memcpy's is on one, where it is fastest. Two tables more compare the kinds of slab, private and shared, with huge pages
and without: copies into and out of one, and what it costs until its first byte is in place.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.build import open_store
from kvstore.config.sections import Config
from kvstore.devices.base import PageTable
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table
from kvstore.lab.bench import Case, Table, measure
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import Request
from kvstore.store import LocalStore
from kvstore.tiers.host import HostSlab
from kvstore.units import KiB, MiB
from radix.namespace import Namespace

BLOCK_SIZE = 64
PAGE_SIZES = (256 * KiB, 2 * MiB)
PROMPT_BYTES = 32 * MiB
PROMPTS_THAT_FIT = 4
OFF_A_PAGE = 16  # bytes: what malloc's own words take before a large piece

SLAB_BYTES = 256 * MiB
QUICK_SLAB_BYTES = 64 * MiB
SLABS: dict[str, dict[str, Any]] = {
    "private, huge pages": {},
    "private, 4 KiB pages": {"huge_pages": False},
    "shared, huge pages where the kernel has them": {"shared_name": "bench"},
}

DEVICE = CpuDevice()

Pages = npt.NDArray[np.uint8]


def run(argument: str, quick: bool) -> list[Table]:
    """Measure pages of 256 KiB and 2 MiB; the store is full, so that every save evicts."""
    tables = [_measure(page_bytes, PROMPT_BYTES // page_bytes, quick) for page_bytes in PAGE_SIZES]
    return [*tables, _copies(PAGE_SIZES[-1], quick), _making(PAGE_SIZES[-1], quick)]


def _measure(page_bytes: int, num_pages: int, quick: bool) -> Table:
    layout = Layout(BLOCK_SIZE, (LayerGroup(GroupKind.FULL, (0,), page_bytes),), "bench", "uint8")
    namespace = Namespace("bench", "1", layout.dtype, layout.fingerprint, BLOCK_SIZE)
    capacity = PROMPTS_THAT_FIT * num_pages
    config = Config(host={"capacity_bytes": capacity * page_bytes})
    engine = _at(OFF_A_PAGE, num_pages, page_bytes)
    on_a_page = _at(0, num_pages, page_bytes)
    table = paged_table([engine])
    starts = count(0, num_pages * BLOCK_SIZE)
    slots = cycle(range(capacity))
    # Memory like the store's, used in turn like the store's: else memcpy would stay in the processor's cache.
    with closing(HostSlab(capacity, page_bytes)) as elsewhere, open_store(config, layout, namespace) as store:
        stored: deque[Request] = deque()  # least recently used first
        fresh: list[Request] = []

        def new_prompt() -> None:
            start = next(starts)
            # One token more than the pages hold: an engine has to compute at least one.
            fresh[:] = [store.request(np.arange(start, start + num_pages * BLOCK_SIZE + 1, dtype=np.uint32))]

        def memcpy() -> None:
            for page in on_a_page:
                np.copyto(elsewhere.array(next(slots)), page)

        def save() -> None:
            if len(stored) == PROMPTS_THAT_FIT:
                stored.popleft()
            stored.append(fresh[0])
            _save(store, fresh[0], table)

        def load() -> None:
            stored.rotate(-1)
            _load(store, stored[-1], table)

        for _ in range(PROMPTS_THAT_FIT):
            new_prompt()
            save()
        cases = [
            Case("memcpy (np.copyto, a page at a time)", memcpy, PROMPT_BYTES),
            Case("save: lease, copy in, publish", save, PROMPT_BYTES, prepare=new_prompt),
            Case("load: lookup, lease, copy out, release", load, PROMPT_BYTES),
        ]
        return measure(f"{num_pages} pages of {page_bytes // KiB} KiB", "bytes", cases, quick=quick)


def _at(offset: int, num_pages: int, page_bytes: int) -> Pages:
    """Memory that begins so many bytes after the beginning of a page of 4 KiB."""
    raw = np.ones(num_pages * page_bytes + 2 * 4 * KiB, np.uint8)
    start = -raw.ctypes.data % (4 * KiB) + offset
    return raw[start : start + num_pages * page_bytes].reshape(num_pages, page_bytes)


def _save(store: LocalStore, request: Request, engine: PageTable) -> None:
    lease = store.prepare_save(request, 0, engine.num_pages)
    if len(lease.pages) != engine.num_pages:
        raise RuntimeError(f"bench host: {len(lease.pages)} of {engine.num_pages} pages found a slot")
    DEVICE.copy_out(
        engine, lease.pages.blocks.tolist(), [store.slots.array(slot) for slot in lease.pages.slots.tolist()]
    )
    store.complete(lease)


def _load(store: LocalStore, request: Request, engine: PageTable) -> None:
    match = store.lookup(request)
    lease = store.prepare_load(request, match.num_blocks)
    if len(lease.pages) != engine.num_pages:
        raise RuntimeError(f"bench host: {len(lease.pages)} of {engine.num_pages} pages were found again")
    DEVICE.copy_in(
        engine, lease.pages.blocks.tolist(), [store.slots.array(slot) for slot in lease.pages.slots.tolist()]
    )
    store.complete(lease)


def _copies(page_bytes: int, quick: bool) -> Table:
    num_pages = (QUICK_SLAB_BYTES if quick else SLAB_BYTES) // page_bytes
    order = np.random.default_rng(0).permutation(num_pages).tolist()
    amount = 2 * num_pages * page_bytes
    with ExitStack() as stack:
        engine, *slabs = (
            stack.enter_context(closing(HostSlab(num_pages, page_bytes, **kind))) for kind in ({}, *SLABS.values())
        )

        def one_memcpy() -> None:
            np.copyto(slabs[0].buffer, engine.buffer)
            np.copyto(engine.buffer, slabs[0].buffer)

        def out_and_in(slab: HostSlab) -> None:
            for slot in order:
                np.copyto(slab.array(slot), engine.array(slot))
            for slot in order:
                np.copyto(engine.array(slot), slab.array(slot))

        cases = [Case("all in one memcpy", one_memcpy, amount)]
        cases += [Case(name, partial(out_and_in, slab), amount) for name, slab in zip(SLABS, slabs, strict=True)]
        return measure(f"copy {num_pages} pages of {page_bytes // KiB} KiB in and out", "bytes", cases, quick=quick)


def _making(page_bytes: int, quick: bool) -> Table:
    num_pages = (QUICK_SLAB_BYTES if quick else SLAB_BYTES) // page_bytes

    def make(kind: dict[str, Any]) -> None:
        HostSlab(num_pages, page_bytes, **kind).close()

    def untouched() -> None:
        with closing(HostSlab(num_pages, page_bytes, prefault=False, huge_pages=False)) as slab:
            slab.buffer[::4096] = 1

    amount = num_pages * page_bytes
    cases = [Case("touched page by page", untouched, amount)]
    cases += [Case(name, partial(make, kind), amount) for name, kind in SLABS.items()]
    return measure("make a slab", "bytes", cases, quick=quick)
