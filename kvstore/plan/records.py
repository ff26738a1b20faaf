"""The plain values that cross between callers, planner and mover, and the numbers that a planner works with.

They hold numbers, bytes, tuples and arrays only, so that each of them can be pickled and, in a multi-process engine,
travel. Times are seconds of the planner's clock unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from kvstore.hints.limits import HintLimits
from kvstore.page import PageKey, PageMeta
from kvstore.plan.wishes import Wish
from radix.hashing import BlockHash, BlockHasher

HOST = "host"  # the name of the tier in the middle, as it appears in counts by tier


class Op(Enum):
    """The task of a lane for a batch of pages."""

    FETCH = "fetch"  # tier -> host slots
    SPILL = "spill"  # host slots -> tier
    PROBE = "probe"  # which of these keys are there?
    TOUCH = "touch"  # refresh recency and deadline
    DELETE = "delete"
    CLEAR = "clear"  # delete everything the tier has of this namespace, whoever wrote it; has no keys
    CLAIM = "claim"  # we are going to compute these blocks, unless another machine is; again: we still are
    UNCLAIM = "unclaim"  # we are not any more


class Priority(IntEnum):
    """Order within a lane: what a request waits for goes first."""

    LOAD = 0
    PREFETCH = 1
    SAVE = 2


@dataclass(frozen=True, slots=True)
class Transfer:
    """One batch for one lane.

    slots:    parallel to keys for FETCH and SPILL, else empty.
    evict:    for SPILL: keys that leave the tier first.
    deadline: when the answer stops being useful; a lane drops what it has not begun by then.
    token:    for CLAIM and UNCLAIM: whose claim it is. lease_s: how long it lives if nobody renews it.
    """

    id: int
    op: Op
    tier: str
    keys: tuple[PageKey, ...]
    priority: Priority
    deadline: float
    slots: tuple[int, ...] = ()
    metas: tuple[PageMeta, ...] = ()
    evict: tuple[PageKey, ...] = ()
    expires_at: float = 0.0  # for TOUCH; Unix time
    token: bytes = b""
    lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a transfer.

    ok:      one answer per key; all False where the whole batch failed. Of a CLAIM: whether it is ours.
    seconds: time inside the tier; 0 where it was never called.
    error:   None, or one line for the log: the tier was not called or did not answer.
    """

    transfer_id: int
    ok: tuple[bool, ...]
    seconds: float = 0.0
    num_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The knowledge of an engine or a gateway about a request, which a cache cannot guess.

    tenant:       salt of the block hashes: tenants never see each other's pages.
    session:      name of the conversation, for statistics and policies.
    priority:     pages of a higher priority stay longer.
    ttl_s:        time to live of the pages this request saves; None means the configured one.
    retain_until: Unix time until which its pages are not evicted from host memory; 0 means no promise.
    pin:          keep its pages in host memory until `unpin`. Both have a budget (`store.max_pinned_fraction`) and an
                  end (`store.pin_max_s`): what does not fit is not kept.
    single_flight: if another request is computing blocks that this one misses, wait for them; if none is, let later
                  requests wait for this one.
    step_blocks:  blocks the engine computes and saves at once, counted from the root; single flight goes by them.
    whole:        a prompt that ends on the border of a block may be matched whole: the engine can take its last block
                  too, and computes the last token once more itself.
    last_turn:    no turn of its session will follow, whatever is said at its end.
    exact:        take no page that a tier stored with loss, and none that was computed after one; what it saves is
                  stored without loss.
    """

    tenant: str = ""
    session: str = ""
    priority: int = 0
    ttl_s: float | None = None
    retain_until: float = 0.0
    pin: bool = False
    single_flight: bool = False
    step_blocks: int = 1
    whole: bool = False
    last_turn: bool = False
    exact: bool = False


@dataclass(slots=True)
class Request:
    """One prompt as the store sees it: chained block hashes and options. It grows with `KVStore.extend`.

    keys:       hashes of the full blocks, root first.
    num_tokens: length of the prompt so far; the tail shorter than a block has no key.
    tokens:     the full blocks' tokens as little-endian uint32 bytes, kept only where hits compare them (xxh3_128).
    hasher:     the chain so far, which `extend` goes on with; None if an engine hashed the blocks.
    held:       leading blocks that the engine has in memory of its own: a lookup weighs only what comes after them.
                Set by the engine's connector, before a lookup.
    holder:     on whose word its pages are kept, for operators; "" in a store of one process.
    payer:      its tenant, by a digest of the name, which may be a secret: what is kept goes by tenants' budgets.
    wishes:     what hints said about it, to be done to what is saved of it.
    loss:       the class of loss in the names of its blocks (kvstore/codecs/loss.py), as a number.
    is_told:    policies know of it, and not yet of its end (see audience.py).
    """

    id: int
    keys: list[BlockHash]
    num_tokens: int
    options: RequestOptions = field(default_factory=RequestOptions)
    tokens: bytearray | None = None
    hasher: BlockHasher | None = None
    held: int = 0
    holder: str = ""
    payer: str = ""
    wishes: tuple[Wish, ...] = ()
    loss: int = 0
    is_told: bool = False


class CutReason(Enum):
    """Why a match ended where it did."""

    NONE = "none"  # the whole prompt matched
    TOO_SHORT = "too_short"  # the prompt has no full block before its last token
    NEVER_STORED = "never_stored"  # the next block is not known on any tier that is up
    TIER_DOWN = "tier_down"  # the next block lies only on a tier whose breaker is open
    NO_STATE = "no_state"  # what follows is stored, but no state of the model at a usable length
    NOT_WORTH = "not_worth"  # loading further would be slower than computing
    BELOW_MINIMUM = "below_minimum"  # something matched, but less than min_hit_blocks
    COMPUTING = "computing"  # another request is computing the next block (single flight); always pending


@dataclass(frozen=True, slots=True)
class Match:
    """The result of a lookup: blocks [0, num_blocks) can be loaded.

    pending:   a shared tier is still being asked, or another request is computing what follows (`cut` says so);
               asking again may show more.
    by_tier:   blocks of the match by the tier they would come from.
    known:     blocks that are stored somewhere, before the cut.
    without_state: blocks whose pages are stored; those after `known` want for a state at their end.
    compute_wait_s: how long the request waited for another one to compute, told with the answer that ended it.
    """

    num_blocks: int
    num_tokens: int
    pending: bool = False
    by_tier: dict[str, int] = field(default_factory=dict)
    known: int = 0
    cut: CutReason = CutReason.NONE
    compute_wait_s: float = 0.0
    without_state: int = 0


class SlotPage(NamedTuple):
    """One page of a lease: block index in the request, layer group, host slot."""

    block: int
    group: int
    slot: int


class SlotPages(Sequence[SlotPage]):
    """The pages of a lease: a sequence of SlotPages that is kept as three parallel arrays. Not to be written to.

    blocks, groups, slots: integers, shape (num_pages,); slots have 64 bits. There are thousands of pages: a caller that
                           is in a hurry takes the arrays, one that is not takes page by page.
    """

    __slots__ = ("blocks", "groups", "slots")

    def __init__(
        self,
        blocks: npt.ArrayLike | Iterable[int] = (),
        groups: npt.ArrayLike | Iterable[int] = (),
        slots: npt.ArrayLike | Iterable[int] = (),
    ) -> None:
        self.blocks: npt.NDArray[np.int32] = np.asarray(blocks, np.int32)
        self.groups: npt.NDArray[np.int16] = np.asarray(groups, np.int16)
        self.slots: npt.NDArray[np.int64] = np.asarray(slots, np.int64)

    @classmethod
    def of(cls, pages: Iterable[SlotPage]) -> SlotPages:
        """Return the pages as arrays."""
        return cls(*zip(*pages, strict=True)) if (pages := list(pages)) else cls()

    def at(self, wanted: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> SlotPages:
        """Return the pages of those indexes, or those whose flag is set, as NumPy takes them."""
        return SlotPages(self.blocks[wanted], self.groups[wanted], self.slots[wanted])

    def __len__(self) -> int:
        return len(self.slots)

    @overload
    def __getitem__(self, index: int) -> SlotPage: ...
    @overload
    def __getitem__(self, index: slice) -> SlotPages: ...
    def __getitem__(self, index: int | slice) -> SlotPage | SlotPages:
        if isinstance(index, slice):
            return SlotPages(self.blocks[index], self.groups[index], self.slots[index])
        return SlotPage(int(self.blocks[index]), int(self.groups[index]), int(self.slots[index]))

    def __iter__(self) -> Iterator[SlotPage]:
        return map(SlotPage, self.blocks.tolist(), self.groups.tolist(), self.slots.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SlotPages):
            return NotImplemented
        return (
            np.array_equal(self.slots, other.slots)
            and np.array_equal(self.blocks, other.blocks)
            and np.array_equal(self.groups, other.groups)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SlotPages({list(self)})"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a lookup matched what it matched, and not the block after that.

    match:   what a lookup would say now, by what is known here and what shared tiers have answered for the request.
    block:   index of the first block that is not matched; None if none is missing.
    key:     its hash.
    tiers:   the tiers that hold pages of it, with whether they are up.
    left:    when it last left a tier, from which and why (Unix time, tier, reason); None if that is not remembered.
    asked:   what shared tiers answered about it: whether they have all of it; None where one did not answer, or was
             not asked.
    """

    match: Match
    block: int | None = None
    key: BlockHash | None = None
    tiers: dict[str, bool] = field(default_factory=dict)
    left: tuple[float, str, str] | None = None
    asked: dict[str, bool | None] = field(default_factory=dict)


class LeaseState(Enum):
    """The state of a load lease."""

    WAITING = "waiting"
    READY = "ready"  # every page it will get is in its slot
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class LoadLease:
    """Pages pinned in host slots for reading, from prepare_load until complete or release.

    blocks:  [0, num_blocks) of the request.
    pages:   in block order; a sliding group has only the blocks inside its window.
    """

    id: int
    num_blocks: int
    num_tokens: int
    pages: SlotPages = field(default_factory=SlotPages)
    by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """The progress of a load lease.

    num_blocks: blocks that can be resumed from with what is ready now; final once state is READY. A page that failed
                to load cuts it.
    """

    state: LeaseState
    num_blocks: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SaveLease:
    """Slots to be filled by the caller, from prepare_save until complete or release.

    pages:   only those the store does not have yet and found room for.
    skipped: pages that found no free slot; they are not saved, and counted.
    """

    id: int
    pages: SlotPages = field(default_factory=SlotPages)
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class FlushResult:
    """The result of a flush; true if all is well.

    ok:        everything that was saved, and everything that was deleted, is so on every tier that should have it. What
               a caller was told in an earlier flush, once and for all lost, is not told again.
    written:   pages written to each tier since the caller's last flush.
    missing:   pages of saves that are not on a tier, and why. "waiting": the time ran out; "out": the tier is taken
               out, and gets them when it is back; "refused": tried in vain, to be tried again while they are in host
               memory; "budget": kept back by the tier's write budget; "lost": gone from host memory before they were
               written, for good.
    undeleted: pages that a tier may still have though they were deleted. "waiting", "out": as above; "dropped": for
               good. A clear that is owed counts as one.
    error:     why nothing is known, where that is so: the daemon is away.
    """

    ok: bool
    written: dict[str, int] = field(default_factory=dict)
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    undeleted: dict[str, dict[str, int]] = field(default_factory=dict)
    error: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        parts = [
            f"{tier}: {num} {what} {why}"
            for what, found in (("pages", self.missing), ("deletes", self.undeleted))
            for tier, counts in found.items()
            for why, num in counts.items()
        ]
        return ", ".join([*parts, self.error] if self.error else parts) or "all is there"


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    """Budgets of speculation (speculation.py).

    mode:        "auto" stops itself where it wastes too much; "on" does not.
    max_slots:   pages in host memory that were brought and not used yet.
    bytes_per_s: read from lower tiers for it.
    max_waste:   bytes brought in vain for each that is used.
    """

    mode: str = "auto"
    max_slots: int = 64
    bytes_per_s: float = 256e6
    max_waste: float = 1.0


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Made by `kvstore.build` from the configuration.

    hash_bytes:  length of a block hash (32, or 16 for xxh3_128).
    compare_tokens: verify the tokens of every block on a hit (hashes that are not collision resistant).
    compute_wait_s: longest wait without progress for another request's computing (single flight); 0 never waits.
    max_pinned_fraction: share of the host slots that pins and promises of `retain_until` may hold, all together.
    max_payer_fraction: share of them that those of one tenant within the store may hold.
    pin_max_s:   after so long each of them ends.
    ttl_after:   seconds that pages of one session alone live on at most, by the word (endings.py) of why its last reply
                 ended; until their next use.
    claimer:     names this store among those that share a tier; no two have the same.
    speculation: of prefetching for idle sessions; None for none.
    hints:       their bounds.
    """

    num_slots: int
    min_hit_blocks: int = 1
    load_or_recompute: bool = True
    lookup_deadline_s: float = 0.05
    load_deadline_s: float = 2.0
    batch_pages: int = 8
    max_prefetch_slots: int = 64
    touch_interval_s: float = 60.0
    hash_bytes: int = 32
    compare_tokens: bool = False
    compute_wait_s: float = 10.0
    max_pinned_fraction: float = 0.5
    max_payer_fraction: float = 0.25
    pin_max_s: float = 86400.0
    ttl_after: Mapping[str, float] = field(default_factory=dict)
    claimer: bytes = b""
    speculation: SpeculationSettings | None = None
    hints: HintLimits = field(default_factory=HintLimits)
