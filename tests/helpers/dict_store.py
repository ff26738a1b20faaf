"""A store that is a dict: the simplest thing that keeps every promise of the `KVStore` face a connector relies on.

It is what the real store is compared with, and where a connector is shown to survive what a real store does rarely: a
page that is granted and then lost, a lease that comes out shorter, a method that raises. No threads, no tiers, no
eviction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout
from kvstore.plan.records import (
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
    SlotPage,
    SlotPages,
)
from radix.hashing import BlockHasher
from radix.namespace import Namespace


class DictStore:
    """Keeps each page as bytes under (block hash, group).

    raises:    names of methods that raise RuntimeError.
    lost:      (block, group) that are granted by a lease, do not arrive, and are known to be gone from then on.
    late:      loads never become ready: what is not `lost` is there, the rest may come after the deadline.
    max_slots: pages one save lease may have; the rest is skipped.
    calls:     how often each method was called.
    """

    def __init__(self, layout: Layout, namespace: Namespace) -> None:
        self.layout = layout
        self.namespace = namespace
        self.pages: dict[tuple[bytes, int], bytes] = {}
        self.raises: set[str] = set()
        self.lost: set[tuple[int, int]] = set()
        self.late = False
        self.max_slots = 1 << 30
        self.calls: Counter[str] = Counter()
        self.prefills: list[int] = []
        self.finishes: list[tuple[str, bool]] = []
        self.replies: list[int] = []
        self.open_leases: dict[int, LoadLease | SaveLease] = {}
        self._requests: dict[int, Request] = {}
        self._slots: dict[int, npt.NDArray[np.uint8]] = {}
        self._next = 0
        self.slots = SimpleNamespace(array=self._slots.__getitem__, slabs=(), buffer=None)
        self.keep = self

    def request(self, tokens: Any, options: RequestOptions | None = None) -> Request:
        self._call("request")
        options = options or RequestOptions()
        hasher = BlockHasher(self.namespace.with_salt(options.tenant).root(), self.layout.block_size)
        hasher.extend(tokens)
        return Request(self._number(), hasher.keys, hasher.num_tokens, options, None, hasher)

    def extend(self, request: Request, tokens: Any) -> None:
        self._call("extend")
        assert request.hasher is not None
        request.hasher.extend(tokens)
        request.num_tokens = request.hasher.num_tokens

    def wait_lookup(self, request: Request, timeout_s: float | None = None) -> Match:
        self._call("wait_lookup")
        return self.lookup(request)

    def peek(self, request: Request, timeout_s: float | None = None) -> Match:
        self._call("peek")
        return self._match(request)

    def lookup(self, request: Request) -> Match:
        self._call("lookup")
        return self._match(request)

    def _match(self, request: Request) -> Match:
        blocks = self._resume_point(request, len(request.keys), set())
        return Match(blocks, blocks * self.layout.block_size, by_tier={"host": blocks})

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        self._call("prepare_load")
        blocks = self._resume_point(request, num_blocks, set())
        pages = []
        for block, group in self._needed(blocks):
            slot = self._slot()
            raw = np.frombuffer(self.pages[request.keys[block], group], np.uint8)
            if (block, group) not in self.lost:
                self._slots[slot][: len(raw)] = raw
            pages.append(SlotPage(block, group, slot))
        lease = LoadLease(
            self._number(),
            blocks,
            blocks * self.layout.block_size,
            SlotPages.of(pages),
            {"host": blocks} if blocks else {},
        )
        self.open_leases[lease.id] = lease
        self._requests[lease.id] = request
        return lease

    def wait(self, lease: LoadLease, timeout_s: float | None = None) -> LeaseStatus:
        self._call("wait")
        request = self._requests[lease.id]
        blocks = self._resume_point(request, lease.num_blocks, self.lost)
        # Only what the lease has can be resumed from: a window that ends earlier may not be in it.
        have = {(page.block, page.group) for page in lease.pages}
        while blocks and not set(self._needed(blocks)) <= have:
            blocks -= 1
        if self.late:
            return LeaseStatus(LeaseState.WAITING, blocks, blocks * self.layout.block_size)
        for block, group in self.lost & have:
            self.pages.pop((request.keys[block], group), None)
        self.lost -= have
        return LeaseStatus(LeaseState.READY, blocks, blocks * self.layout.block_size)

    def poll(self, lease: LoadLease) -> LeaseStatus:
        return self.wait(lease, 0.0)

    def prepare_save(
        self, request: Request, first: int, num_blocks: int, *, owner: str = "", states: Sequence[int] = ()
    ) -> SaveLease:
        self._call("prepare_save")
        assert 0 <= first <= first + num_blocks <= len(request.keys)
        missing = [
            (block, group)
            for block in range(first, first + num_blocks)
            for group in range(len(self.layout.groups) if block in states else self.layout.block_groups)
            if (request.keys[block], group) not in self.pages
        ]
        pages = SlotPages.of([SlotPage(block, group, self._slot()) for block, group in missing[: self.max_slots]])
        lease = SaveLease(self._number(), pages, len(missing) - len(pages))
        self.open_leases[lease.id] = lease
        self._requests[lease.id] = request
        return lease

    def complete(self, lease: LoadLease | SaveLease, *, filled: Sequence[bool] | None = None) -> None:
        self._call("complete")
        if isinstance(lease, SaveLease) and lease.id in self.open_leases:
            keys = self._requests[lease.id].keys
            for page, is_filled in zip(lease.pages, filled or [True] * len(lease.pages), strict=True):
                if is_filled:
                    stored = self.layout.stored_bytes(page.group)
                    self.pages[keys[page.block], page.group] = self._slots[page.slot][:stored].tobytes()
        self._end(lease)

    def release(self, lease: LoadLease | SaveLease) -> None:
        self._end(lease)

    def finished(
        self, request: Request, *, finish_reason: str = "", last_turn: bool = False, reply_tokens: int = -1
    ) -> None:
        self._call("finished")
        self.finishes.append((finish_reason, last_turn))
        self.replies.append(reply_tokens)

    def forget(self, request: Request, first: int = 0) -> int:
        groups = range(len(self.layout.groups))
        return sum(any([self.pages.pop((key, group), None) for group in groups]) for key in request.keys[first:])

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        self._call("observe_prefill")
        self.prefills.append(num_tokens)

    def close(self, timeout_s: float | None = None) -> None:
        self._call("close")

    def _needed(self, num_blocks: int) -> list[tuple[int, int]]:
        needed = []
        for group in range(len(self.layout.groups)):
            window = self.layout.window_blocks(group)
            first = 0 if window is None else max(0, num_blocks - window)
            needed += [(block, group) for block in range(first, num_blocks)]
        return needed

    def _resume_point(self, request: Request, most: int, lost: set[tuple[int, int]]) -> int:
        for blocks in range(min(most, len(request.keys)), 0, -1):
            needed = self._needed(blocks)
            if all((request.keys[block], group) in self.pages for block, group in needed) and not lost & set(needed):
                return blocks
        return 0

    def _call(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.raises:
            raise RuntimeError(f"{name} was told to fail")

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _slot(self) -> int:
        slot = self._number()
        # Not zeros: a page that was never copied must not look like one.
        self._slots[slot] = np.full(self.layout.slot_bytes, 0xA5, np.uint8)
        return slot

    def _end(self, lease: LoadLease | SaveLease) -> None:
        if self.open_leases.pop(lease.id, None) is not None:
            for page in lease.pages:
                del self._slots[page.slot]
