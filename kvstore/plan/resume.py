"""The rule of conduct of layer groups: after how many blocks can a model resume?

A full (or MLA) group needs every block of [0, N). A sliding group needs only its last `window_blocks` before N, so N is
a resume point if the run of present blocks that ends at N is at least min(N, window_blocks) long:

    full     x x x x x x x .
    sliding  . . x x . x x .      window_blocks = 2
    N can be 4 and 7 (and 0), not 5, 6 or 8

The pieces of a state are groups whose window is one block: N is a resume point if the block that ends there has them
all. Pages and state count as one thing: neither is worth anything without the other.
"""

from __future__ import annotations

from collections.abc import Sequence


def longest_resume(present: Sequence[Sequence[object]], windows: Sequence[int | None], limit: int) -> int:
    """The largest N <= limit from which every group can resume.

    present: per group, one entry per block, 0 or False where it is absent; a shorter list means absent from there on.
    windows: per group, blocks needed before a resume point; None means all.
    """
    for group, window in enumerate(windows):
        if window is None:
            limit = min(limit, _leading(present[group], limit))
    sliding = [(present[group], window) for group, window in enumerate(windows) if window is not None]
    if not sliding or limit == 0:
        return limit
    ends = [flags for flags, window in sliding if window == 1]
    sliding = [(flags, window) for flags, window in sliding if window != 1]
    if ends:  # few blocks have a state, and the deepest is mostly near the end: look from there
        if not sliding:
            return next((n for n in range(_shortest(ends, limit), 0, -1) if all([flags[n - 1] for flags in ends])), 0)
        limit = _shortest(ends, limit)
    best = 0
    runs = [0] * len(sliding)
    for block in range(limit):
        resumable = True
        for index, (flags, window) in enumerate(sliding):
            run = runs[index] + 1 if block < len(flags) and flags[block] else 0
            runs[index] = run
            if run < window and run <= block:  # min(N, window) with N = block + 1
                resumable = False
        if resumable and all([flags[block] for flags in ends]):
            best = block + 1
    return best


def needed_from(num_blocks: int, window: int | None) -> int:
    """The first block of a group that must be loaded to resume after `num_blocks`."""
    return 0 if window is None else max(0, num_blocks - window)


def _shortest(columns: Sequence[Sequence[object]], limit: int) -> int:
    return min(limit, *map(len, columns))


def _leading(flags: Sequence[object], limit: int) -> int:
    try:
        return flags.index(0, 0, limit)
    except ValueError:
        return min(len(flags), limit)
