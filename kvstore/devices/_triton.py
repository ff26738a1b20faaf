"""The Triton kernel that moves runs between an engine's pages and a contiguous staging buffer.

triton and torch are imported when the kernel is first asked for, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BLOCK = 1024  # units a program moves: 8 KiB of 8-byte units; a guess, not tuned

tl: Any = None  # triton.language; a kernel finds names among its module's globals only


def make_copy_runs() -> Callable[..., None]:
    """Build the kernel and return `copy_runs`, which launches it on the current stream.

    copy_runs(runs, staging, *, num_runs, num_pages, page_bytes, run_bytes, unit, into_staging):

    runs:      int64 on the device, [4 * num_runs + num_pages]: base | page stride | length | offset | page ids, lengths
               and offsets in units.
    staging:   uint8 on the device, at least num_pages * page_bytes.
    run_bytes: of the longest run.
    unit:      bytes, of 8, 4, 2 and 1, that divide every address, stride and length.

    Raises ImportError where triton is not installed.
    """
    global tl
    import torch
    import triton
    import triton.language as tl

    elements = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    triton_elements = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.uint8}

    # Not annotated beyond constexpr: triton would look the names up on the GPU's side.
    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        runs, staging, num_runs, page_units, INTO_STAGING: tl.constexpr, ELEMENT: tl.constexpr, UNITS: tl.constexpr
    ):
        run = tl.program_id(0) % num_runs
        page = tl.program_id(0) // num_runs
        base = tl.load(runs + run)
        page_stride = tl.load(runs + num_runs + run)
        length = tl.load(runs + 2 * num_runs + run)
        offset = tl.load(runs + 3 * num_runs + run)
        page_id = tl.load(runs + 4 * num_runs + page)
        unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        in_engine = (base + page_id * page_stride).to(tl.pointer_type(ELEMENT)) + unit
        in_staging = staging + page.to(tl.int64) * page_units + offset + unit
        if INTO_STAGING:
            tl.store(in_staging, tl.load(in_engine, mask=unit < length), mask=unit < length)
        else:
            tl.store(in_engine, tl.load(in_staging, mask=unit < length), mask=unit < length)

    def copy_runs(
        runs: Any,
        staging: Any,
        *,
        num_runs: int,
        num_pages: int,
        page_bytes: int,
        run_bytes: int,
        unit: int,
        into_staging: bool,
    ) -> None:
        grid = (num_pages * num_runs, -(-run_bytes // (unit * BLOCK)))
        kernel[grid](
            runs,
            staging[: num_pages * page_bytes].view(elements[unit]),
            num_runs,
            page_bytes // unit,
            INTO_STAGING=into_staging,
            ELEMENT=triton_elements[unit],
            UNITS=BLOCK,
        )

    return copy_runs
