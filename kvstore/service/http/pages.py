"""Pages over plain HTTP, as a framed stream: for whoever has an HTTP client and no client library of ours.

All numbers are little endian.

    PUT body:   u32 length of a JSON prompt | the JSON | frames
    frame:      block u32 | group u16 | 0 u16 | length u32 | 0 u32 | xxh3_64 of the bytes u64 | the bytes

What is read is written from the slots, and what is put is received into them piece by piece, so memory does not grow
with the body. A page whose checksum is wrong is not stored, and the call says so. What a transfer may hold, and for how
long, is in transfers.py.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from aiohttp import web

from kvstore.plan.records import LeaseState, LeaseStatus, Request, SaveLease
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.daemon.transfers import PageTransfer, Transfers
from kvstore.service.http.models import Prompt, Read
from kvstore.service.http.parsing import Parser
from kvstore.service.http.problems import Problem
from kvstore.web.server import Handler

CONTENT_TYPE = "application/vnd.kvstore.pages"
FRAME = struct.Struct("<IHHIIQ")
_LENGTH = struct.Struct("<I")
MAX_PROMPT_BYTES = 16 << 20
READ_TIMEOUT_S = 30.0  # without a single byte; also for the prompt as a whole, and for the head of a frame
PIECE_BYTES = 256 << 10  # what is written at once

Opened = Callable[[Prompt], Awaitable[tuple[OpenStore, Request]]]


async def send(request: web.Request, transfer: PageTransfer, prompt: Request, body: Read) -> web.StreamResponse:
    """Stream the stored pages of a prompt. The pages stay leased until they are sent."""
    opened = transfer.opened
    store = opened.store
    match = await opened.wait_lookup(prompt, body.timeout_s)
    limit = match.num_blocks if body.num_blocks is None else min(match.num_blocks, body.num_blocks)
    lease = store.prepare_load(prompt, limit, owner="http")
    transfer.hold(lease)
    status = await opened.wait_for(lambda: _ended(store.poll(lease)), body.timeout_s) or store.poll(lease)
    pages = [page for page in lease.pages if page.block < status.num_blocks]
    sizes = [opened.layout.stored_bytes(page.group) for page in pages]
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE, "X-Blocks": str(status.num_blocks)})
    response.content_length = sum(sizes) + FRAME.size * len(pages)
    await response.prepare(request)
    for page, size in zip(pages, sizes, strict=True):
        transfer.check()
        view = store.slots.view(page.slot)[:size]
        checksum = xxhash.xxh3_64_intdigest(view)
        await response.write(FRAME.pack(page.block, page.group, 0, size, 0, checksum))
        for at in range(0, size, PIECE_BYTES):
            transfer.check()
            # Copied: what the transport cannot send at once it keeps, and the slot is another's when the lease ends.
            await response.write(bytes(view[at : at + PIECE_BYTES]))
    await response.write_eof()
    transfer.complete(lease)
    return response


async def receive(request: web.Request, opened_for: Opened, transfers: Transfers, parser: Parser) -> int:
    """Store the pages of a body; returns the blocks that became whole. Raises Problem."""
    body = _Body(request)
    body.give(READ_TIMEOUT_S)
    (num_prompt,) = _LENGTH.unpack(await body.exactly(_LENGTH.size))
    if num_prompt > MAX_PROMPT_BYTES:
        raise Problem(413, "the prompt is too large", f"{num_prompt} bytes; at most {MAX_PROMPT_BYTES}", "prompt")
    prompt = await parser.read(Prompt, await body.exactly(num_prompt), "prompt")
    opened, blocks = await opened_for(prompt)
    if isinstance(request.protocol, Handler):
        request.protocol.working()
    with transfers.begin(request, opened, "stored by") as transfer:
        saving = _Saving(transfer, blocks)
        while True:
            body.give(READ_TIMEOUT_S)
            head = await body.some(FRAME.size)
            if head is None:
                return saving.end()
            body.give(None)
            await saving.page(head, body)


@dataclass(slots=True)
class _Filling:
    """A lease of one block, and which of its pages have come."""

    block: int
    lease: SaveLease
    have: set[int] = field(default_factory=set)


class _Saving:
    """Takes the pages of one body into slots, by a lease for each block and each state. What is not whole is dropped.

    A lease for a state has slots for the pages of its block, too, where they are not here; they may come later, or not.
    """

    def __init__(self, transfer: PageTransfer, request: Request) -> None:
        self._transfer = transfer
        self._opened = transfer.opened
        self._request = request
        self._asked: set[tuple[int, bool]] = set()  # blocks, and whether for the state after them
        self._places: dict[tuple[int, int], tuple[_Filling, int]] = {}  # by block and group: index in the lease
        self._open: dict[int, _Filling] = {}  # by lease
        self._whole: set[int] = set()

    def end(self) -> int:
        """The body is over; returns how many blocks have become whole, or have a state now."""
        for filling in list(self._open.values()):
            groups = [page.group for page in filling.lease.pages]
            states = [self._opened.layout.groups[group].is_state for group in groups]
            whole = {kind for kind in states if all(i in filling.have for i, k in enumerate(states) if k is kind)}
            if whole:
                self._complete(filling, [kind in whole for kind in states])
        return len(self._whole)

    async def page(self, head: bytes, body: _Body) -> None:
        """One frame. A page that is there already, or finds no room, is read and dropped."""
        block, group, zero, size, zeros, checksum = FRAME.unpack(head)
        layout = self._opened.layout
        if block >= len(self._request.keys):
            raise Problem(400, "the body is not valid", f"the prompt has {len(self._request.keys)} blocks", "block")
        if group >= len(layout.groups) or zero or zeros:
            raise Problem(400, "the body is not valid", f"the layout has {len(layout.groups)} groups", "group")
        if size != layout.stored_bytes(group):
            raise Problem(400, "the body is not valid", f"a page has {layout.stored_bytes(group)} bytes", "length")
        filling, index = self._place(block, group)
        if filling is None or index in filling.have:
            await body.skip(size)
            return
        view = self._opened.store.slots.array(filling.lease.pages[index].slot)[:size]
        await body.into(view, self._transfer)
        if xxhash.xxh3_64_intdigest(view.data) != checksum:
            raise Problem(400, "the body is not valid", f"block {block}: the bytes have another checksum", "checksum")
        filling.have.add(index)
        if len(filling.have) == len(filling.lease.pages):
            self._complete(filling)

    def _place(self, block: int, group: int) -> tuple[_Filling | None, int]:
        """The lease that has a slot for a page, and the page's index in it; None where there is none."""
        is_state = self._opened.layout.groups[group].is_state
        if (block, group) not in self._places and (block, is_state) not in self._asked:
            self._asked.add((block, is_state))
            states = [block] if is_state else []
            lease = self._opened.store.prepare_save(self._request, block, 1, owner="http", states=states)
            self._transfer.hold(lease)
            filling = self._open[lease.id] = _Filling(block, lease)
            self._places |= {(block, page.group): (filling, index) for index, page in enumerate(lease.pages)}
        return self._places.get((block, group), (None, 0))

    def _complete(self, filling: _Filling, filled: Sequence[bool] | None = None) -> None:
        self._transfer.complete(filling.lease, filled)
        del self._open[filling.lease.id]
        for page in filling.lease.pages:
            del self._places[filling.block, page.group]
        self._whole.add(filling.block)


class _Body:
    """A request's body, taken in pieces as they come."""

    def __init__(self, request: web.Request) -> None:
        self._content = request.content
        self._rest = memoryview(b"")
        self._until: float | None = None

    def give(self, seconds: float | None) -> None:
        """So long for all that is read from here on; None: as long as something comes."""
        self._until = None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def exactly(self, n: int) -> bytes:
        """The next `n` bytes; Problem 400 if the body ends before."""
        data = await self.some(n)
        if data is None:
            raise Problem(400, "the body is not valid", "it ends too early", "body")
        return data

    async def some(self, n: int) -> bytes | None:
        """The next `n` bytes; None at the end of the body."""
        parts = bytearray()
        while len(parts) < n:
            piece = await self._piece(n - len(parts))
            if not piece:
                if parts:
                    raise Problem(400, "the body is not valid", "it ends within a frame", "body")
                return None
            parts += piece
        return bytes(parts)

    async def into(self, view: np.ndarray[tuple[int], np.dtype[np.uint8]], transfer: PageTransfer) -> None:
        """Fill a slot, as long as it is the transfer's."""
        at = 0
        while at < len(view):
            piece = await self._piece(len(view) - at)
            if not piece:
                raise Problem(400, "the body is not valid", "it ends within a page", "body")
            transfer.check()
            np.copyto(view[at : at + len(piece)], np.frombuffer(piece, np.uint8))
            at += len(piece)

    async def skip(self, n: int) -> None:
        """Pass over bytes."""
        while n:
            piece = await self._piece(n)
            if not piece:
                raise Problem(400, "the body is not valid", "it ends within a page", "body")
            n -= len(piece)

    async def _piece(self, most: int) -> memoryview:
        if not self._rest:
            try:
                left_s = READ_TIMEOUT_S
                if self._until is not None:
                    left_s = min(left_s, max(0.0, self._until - asyncio.get_running_loop().time()))
                self._rest = memoryview(await asyncio.wait_for(self._content.readany(), left_s))
            except asyncio.TimeoutError:
                told = f"too little came in {READ_TIMEOUT_S:.0f} s"
                raise Problem(408, "the body is not taken", told, "body") from None
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece


def _ended(status: LeaseStatus) -> LeaseStatus | None:
    return None if status.state is LeaseState.WAITING else status
