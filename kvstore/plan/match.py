"""The match of a prompt: the place of every page, and how much should be loaded.

A survey is one walk over the known prefix. It does no I/O: what the catalog does not know and a shared tier might,
is asked by a probe, and the answer is remembered with the request until it is finished.

    [0, worth)            will be loaded: on some tier, resumable, and faster than computing
    [worth, known)        stored, but not worth loading (or not resumable)
    [known, limit)        not stored anywhere that can be asked
    [limit, len(tokens))  the last token is always computed by the engine, and so is a tail shorter than a block
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvstore.plan.records import HOST, CutReason, Match, Request
from kvstore.plan.resume import needed_from
from kvstore.plan.state import Block, PageState

ABSENT = 0  # source codes: ABSENT, IN_HOST, or FIRST_LOWER + index of a lower tier
IN_HOST = 1
FIRST_LOWER = 2


@dataclass(slots=True)
class Probe:
    """The answers of one shared tier about the blocks [first, end) of a request.

    answer:      block-major, one entry per group; False until something else is known.
    transfer_id: of the question under way; 0 if there is none.
    has_failed:  nothing came in time: as good as nothing there, but for those who want to know.
    """

    first: int
    end: int
    answer: list[bool]
    transfer_id: int = 0
    has_failed: bool = False


@dataclass(slots=True)
class RequestState:
    """The planner's note of a request between its first lookup and its end."""

    request: Request
    probes: dict[int, Probe] = field(default_factory=dict)  # by index of the lower tier
    num_counted: int = -1  # prompt length at the last lookup that was counted in the statistics
    asked_at: float = 0.0
    first: tuple[int, Match] | None = None  # prompt length at the first lookup that was counted, and its answer
    unsettled: tuple[Survey, Match] | None = None  # the last answer, while it is pending


@dataclass(slots=True)
class Survey:
    """The answer: blocks known to the catalog, and the source of every page by group."""

    blocks: list[Block]
    sources: list[list[int]]
    worth: int = 0
    known: int = 0
    cut: CutReason = CutReason.NONE
    num_states: int = 0  # the last columns: pieces of states
    without_state: int = 0  # blocks that could be resumed from if there were a state at their end

    def source(self, block: int, group: int) -> int:
        column = self.sources[group]
        return column[block] if block < len(column) else ABSENT

    def by_tier(self, names: Sequence[str], windows: Sequence[int | None]) -> dict[str, int]:
        """Blocks of the worthwhile prefix by the slowest tier any of their pages comes from."""
        return dict(Counter(self.block_sources(names, windows)))

    def block_sources(self, names: Sequence[str], windows: Sequence[int | None]) -> list[str]:
        """Tier name of each block of the worthwhile prefix, by the slowest tier of the pages it needs.

        A block before every window needs none: it is spared by the pages behind it, and counts as theirs.
        """
        if len(self.sources) == 1 and windows[0] is None:
            return [names[code] for code in self.sources[0][: self.worth]]
        starts = [needed_from(self.worth, window) for window in windows]
        found: list[str] = []
        name = HOST
        for block in range(self.worth - 1, -1, -1):
            codes = [self.source(block, group) for group, start in enumerate(starts) if block >= start]
            name = names[max(codes)] if codes else name
            found.append(name)
            if self.num_states and not found[1:]:
                del starts[-self.num_states :]  # the last block alone has a state that is needed
        return found[::-1]


def loadable_blocks(request: Request, block_size: int) -> int:
    """How many blocks of a prompt a lookup may match.

    The engine needs the hidden state of the last token, so that token is always computed, and its block with it unless
    the engine can compute a single token of a block that was loaded (`RequestOptions.whole`).
    """
    num_tokens = request.num_tokens if request.options.whole else max(request.num_tokens - 1, 0)
    return min(num_tokens // block_size, len(request.keys))


def locate(
    blocks: Sequence[Block], group: int, tier_order: Sequence[tuple[int, int]], stalled: Collection[int] = ()
) -> list[int]:
    """Source code of the page of `group` in every block.

    tier_order: (bit, code) of the tiers that may be read, preferred first.
    stalled:    fetches that must not be waited for: what they fill counts as absent.
    """
    ready, filling = PageState.READY, PageState.FILLING
    codes: list[int] = []
    append = codes.append
    for block in blocks:
        page = block.pages[group]
        state = page.state
        if state is ready or (state is filling and page.flight and page.flight not in stalled):
            append(IN_HOST)
            continue
        homes = page.homes
        if homes and not state:
            for bit, code in tier_order:
                if homes & bit:
                    append(code)
                    break
            else:
                append(ABSENT)
            continue
        append(ABSENT)
    return codes


def locate_states(
    blocks: Sequence[Block], groups: range, tier_order: Sequence[tuple[int, int]], stalled: Collection[int] = ()
) -> list[list[int]]:
    """Source codes of the pieces of the states of blocks, by group; few blocks have any."""
    columns = [[ABSENT] * len(blocks) for _ in groups]
    for at, block in enumerate(blocks):
        if len(block.pages) > groups.start:
            for group in groups:
                columns[group - groups.start][at] = locate((block,), group, tier_order, stalled)[0]
    return columns


def tier_names(lower: Sequence[str]) -> list[str]:
    """Names by source code."""
    return ["", HOST, *lower]
