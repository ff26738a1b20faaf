"""The offline optimum: what no policy can beat, because it knows the future.

Belady's MIN over blocks of one size: whatever is used again last leaves first. A block's next use is never before that
of what continues it, so with ties going to the deeper block the optimum keeps prefixes whole by itself: it is the bound
of every policy that evicts leaves first. As in a store below an engine, any block may leave, the request's own too.

The compiled engine finds the same (compiled.py), and sweeps ask it where it is built; here it is said in few lines.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from kvstore.lab.traces import ReplayTrace

NEVER = 1 << 62  # the next use of what is not used again
SPARE = 4096  # entries of the heap that may be stale


def optimal_hit_tokens(trace: ReplayTrace, num_slots: int) -> int:
    """Return the most prompt tokens that a store of `num_slots` blocks could have served. O(references log blocks)."""
    next_uses = _next_uses(trace)
    resident: dict[int, tuple[int, int]] = {}  # block: its next use and its depth, negated
    heap: list[tuple[int, int, int]] = []  # the same and the block; used again last comes first
    hit_tokens = 0
    for request, uses in zip(trace.requests, next_uses, strict=True):
        blocks = request.blocks
        num_hits = next((i for i, block in enumerate(blocks) if block not in resident), len(blocks))
        hit_tokens += min(num_hits * trace.block_tokens, request.num_prompt_tokens)
        for depth, (block, use) in enumerate(zip(blocks, uses, strict=True)):
            rank = (-use, -depth)
            resident[block] = rank
            heappush(heap, (*rank, block))
        while len(resident) > num_slots:
            use, depth, block = heappop(heap)
            if resident.get(block) == (use, depth):
                del resident[block]
        if len(heap) > 2 * len(resident) + SPARE:
            heap = [(*rank, block) for block, rank in resident.items()]
            heapify(heap)
    return hit_tokens


def _next_uses(trace: ReplayTrace) -> list[list[int]]:
    """For each request, the number of the next one that uses each of its blocks."""
    seen: dict[int, int] = {}
    uses: list[list[int]] = []
    for number in range(len(trace.requests) - 1, -1, -1):
        blocks = trace.requests[number].blocks
        uses.append([seen.get(block, NEVER) for block in blocks])
        seen.update(dict.fromkeys(blocks, number))
    uses.reverse()
    return uses
