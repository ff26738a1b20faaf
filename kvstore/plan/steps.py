"""Long work in steps, between which the store's lock is let go.

What a verb does for a long prompt is a generator. It yields where the books are in order, so that others use the store
meanwhile, and returns what the verb answers. Short prompts take one step and pay for no other. After a yield nothing
that was found before it needs to be so any more: blocks may have left, leases may have ended.

Whatever has to be done to its end keeps its place in the books, not in the generator: a lease that is ending has what
is left of it, so that anyone can go on with it. A generator may be dropped at any yield, and needs no clean-up then.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]

STEP_BLOCKS = 512  # of pages that need room: about 4 ms where each costs 8 us
STEP_PAGES = 1024  # of pages that are only booked: 1 to 3 ms


def at_once(steps: Steps[T]) -> T:
    """Carry out all steps; returns the answer."""
    try:
        while True:
            next(steps)
    except StopIteration as over:
        answer: T = over.value
        return answer


def parts(items: Sequence[T], size: int = 0) -> Iterator[Sequence[T]]:
    """The steps of long work, first to last. Items that fit one step are handed on as they are.

    size: of a step; 0 means STEP_PAGES.
    """
    size = size or STEP_PAGES
    if len(items) <= size:
        yield items
        return
    for start in range(0, len(items), size):
        yield items[start : start + size]


def parts_from_tail(items: Sequence[T], size: int = 0) -> Iterator[Sequence[T]]:
    """The same, last to first; each part is in order itself."""
    size = size or STEP_PAGES
    if len(items) <= size:
        yield items
        return
    for end in range(len(items), 0, -size):
        yield items[max(0, end - size) : end]
