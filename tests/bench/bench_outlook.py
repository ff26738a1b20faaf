"""How far `outlook` goes from LRU to the optimum, cell by cell, by what it is told.

    python tests/bench/bench_outlook.py TRACE... [--hinted 0.5] [--json FILE]

Traces are played through host memory of 1, 5, 10 and 25 % of their blocks by the compiled engine. Told for each cell:
the token hit rate, the share of the way that is closed (points beside LRU where the way is shorter than half a point),
and microseconds of CPU a block reference. A row for each kind of knowledge:

    ids       blocks and times
    replies   and how long replies were
    reasons   and why they ended
    hinted    and for a share of the requests, truthfully, whether more than half of their blocks are used again

The mean is that of all cells that count, none of which counts less than -100 %.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.lab.compiled import TraceArrays, optimum, play
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.traces import ReplayTrace, read_trace

SHARES = (0.01, 0.05, 0.1, 0.25)
LEAST_GAP = 0.005
KNOWLEDGE = {"ids": (), "replies": (2,), "reasons": (0, 2), "hinted": (0, 1, 2)}  # columns of TraceArrays.told
SEED = 7


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--hinted", type=float, default=0.5, help="share of the requests with a truthful hint")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cells = [cell for path in args.traces for cell in cells_of(read_trace(path), args.hinted)]
    for knowledge in KNOWLEDGE:
        of_kind = [cell for cell in cells if cell["knowledge"] == knowledge]
        gaps = [max(cell["closed"], -1.0) for cell in of_kind if cell["closed"] is not None]
        worst = min(cell["rate"] - cell["lru"] for cell in of_kind)
        mean = f"{100 * np.mean(gaps):.1f} %" if gaps else "-"
        print(f"{knowledge:9} mean {mean} of the way over {len(gaps)} cells, worst {100 * worst:+.2f} points")
    if args.json:
        args.json.write_text(json.dumps(cells, indent=1))


def cells_of(trace: ReplayTrace, hinted: float) -> list[dict[str, Any]]:
    """Play a trace; print a line for each kind of knowledge, and return the cells."""
    arrays = TraceArrays.of(trace)
    told = with_hints(arrays, hinted)
    tokens = np.array([request.num_prompt_tokens for request in trace.requests], np.int64)
    sizes = [trace.blocks_of(share) for share in SHARES]

    def rate(hit_blocks: npt.NDArray[np.int32]) -> float:
        return float(np.minimum(hit_blocks[:, 0].astype(np.int64) * trace.block_tokens, tokens).sum() / tokens.sum())

    lru = [rate(play(arrays, Setup(((HOST, size),))).hit_blocks) for size in sizes]
    best = [rate(optimum(arrays, size).hit_blocks) for size in sizes]
    cells = []
    for knowledge, columns in KNOWLEDGE.items():
        known = np.full_like(told, -1)
        known[:, columns] = told[:, columns]
        line = f"{trace.name[:24]:24} {knowledge:8}"
        for share, size, floor, ceiling in zip(SHARES, sizes, lru, best, strict=True):
            played = play(replace(arrays, told=known), Setup(((HOST, size),), "outlook"))
            found, cost = rate(played.hit_blocks), 1e6 * played.cpu_s / len(arrays.ids)
            closed = (found - floor) / (ceiling - floor) if ceiling - floor >= LEAST_GAP else None
            cells.append(
                {"trace": trace.name, "knowledge": knowledge, "share": share, "rate": found, "lru": floor}
                | {"optimum": ceiling, "closed": closed, "us": cost}
            )
            gain = f"{100 * (found - floor):+.2f}" if closed is None else f"{100 * closed:+.0f} %"
            line += f"   {100 * found:5.2f} ({gain:>6}) {cost:.2f} us"
        print(line, flush=True)
    return cells


def with_hints(arrays: TraceArrays, share: float) -> npt.NDArray[np.int32]:
    """Return what is told, with a truthful hint for a share of the requests."""
    told, uses, num = arrays.told.copy(), arrays.next_uses() < arrays.num_requests, arrays.num_requests
    is_hinted = np.random.default_rng(SEED).random(num) < share
    for number in np.flatnonzero(is_hinted):
        again = uses[arrays.offsets[number] : arrays.offsets[number + 1]]
        told[number, 1] = not len(again) or again.mean() <= 0.5
    return told


if __name__ == "__main__":
    main()
