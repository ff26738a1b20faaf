"""Gather pages from an engine's tensors into host slots and scatter them back, over one memcpy of the same bytes.

The engine's memory and the slab are large, and pages and slots are drawn at random for every copy, so that nothing is
in the processor's cache. `native` is the C extension, `numpy` its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.devices.base import PageTable
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table, token_table
from kvstore.lab.bench import Case, Table, measure
from kvstore.layout import SLOT_ALIGNMENT
from kvstore.tiers.host import HostSlab
from kvstore.units import KiB, MiB

POOL_BYTES = 256 * MiB  # the engine's memory; the slab is as large
QUICK_POOL_BYTES = 64 * MiB

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EngineShape:
    """An engine's memory: `pieces` tensors, paged with one run of `run_bytes` a block, or tokens of `heads` heads.

    pages: copied by one call.
    """

    name: str
    pieces: int
    run_bytes: int
    pages: int
    heads: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of a block in all tensors."""
        return self.pieces * self.run_bytes * max(1, self.heads)


SHAPES = (
    EngineShape("SmolLM2, 64 tokens, contiguous cache: 180 runs of 8 KiB", 60, 8 * KiB, 16, heads=3),
    EngineShape("SmolLM2, 16 tokens, contiguous cache: 180 runs of 2 KiB", 60, 2 * KiB, 64, heads=3),
    EngineShape("8B, 16 tokens, paged: 64 runs of 32 KiB", 64, 32 * KiB, 16),
    EngineShape("small, 16 tokens, paged: 64 runs of 4 KiB", 64, 4 * KiB, 64),
    EngineShape("8B, 16 tokens, paged, one page a call", 64, 32 * KiB, 1),
)


def run(argument: str, quick: bool) -> list[Table]:
    """Measure engines of these shapes."""
    pool_bytes = QUICK_POOL_BYTES if quick else POOL_BYTES
    with ExitStack() as stack:
        engine, slab = (
            stack.enter_context(closing(HostSlab(pool_bytes // SLOT_ALIGNMENT, SLOT_ALIGNMENT))) for _ in "es"
        )
        return [_measure(shape, engine.buffer, slab.buffer, quick) for shape in SHAPES]


def _measure(shape: EngineShape, engine: Bytes, slab: Bytes, quick: bool) -> Table:
    page_bytes = shape.page_bytes
    num_pages = len(engine) // page_bytes
    table = _table(shape, engine, num_pages)
    slots = [slab[i * page_bytes : (i + 1) * page_bytes] for i in range(num_pages)]
    rng = np.random.default_rng(0)
    amount = shape.pages * page_bytes
    pages: list[int] = []
    targets: list[Bytes] = []

    def draw() -> None:
        first = int(rng.integers(num_pages - shape.pages + 1))
        # The pages of one prompt follow each other in a contiguous cache, and lie anywhere in a paged engine.
        ids = range(first, first + shape.pages) if shape.heads else rng.permutation(num_pages)[: shape.pages].tolist()
        pages[:] = ids
        targets[:] = [slots[i] for i in rng.permutation(num_pages)[: shape.pages]]

    def memcpy() -> None:
        to, source = (int(i) * page_bytes for i in rng.integers(num_pages - shape.pages + 1, size=2))
        np.copyto(slab[to : to + amount], engine[source : source + amount])

    def case(name: str, copy: Callable[..., object]) -> Case:
        return Case(name, lambda: copy(table, pages, targets), amount, draw)

    cases = [Case("memcpy", memcpy, amount)]
    for name, device in {"native": CpuDevice(), "numpy": CpuDevice(native=False)}.items():
        if name == "numpy" or device.is_native:
            cases += [case(f"{name} gather", device.copy_out), case(f"{name} scatter", device.copy_in)]
    return measure(f"{shape.name} ({amount / MiB:.3g} MiB a call)", "bytes", cases, quick=quick)


def _table(shape: EngineShape, engine: Bytes, num_pages: int) -> PageTable:
    """Cut the engine's memory into the shape's tensors."""
    tensor = (shape.heads, num_pages, shape.run_bytes) if shape.heads else (num_pages, shape.run_bytes)
    size = int(np.prod(tensor))
    tensors = [engine[i * size : (i + 1) * size].reshape(tensor) for i in range(shape.pieces)]
    return token_table(tensors, 1) if shape.heads else paged_table(tensors)
