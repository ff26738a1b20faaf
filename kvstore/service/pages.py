"""Pages over plain HTTP, as a framed stream: for whoever has an HTTP client and no client library of ours.

All numbers are little endian.

    PUT body:   u32 length of a JSON prompt | the JSON | frames
    frame:      block u32 | group u16 | 0 u16 | length u32 | 0 u32 | xxh3_64 of the bytes u64 | the bytes

What is read is written from the slots, and what is put is received into them piece by piece, so memory does not grow
with the body. A page whose checksum is wrong is not stored, and the call says so.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash
from aiohttp import web
from pydantic import ValidationError

from kvstore.plan.records import LeaseState, LeaseStatus, Request, SaveLease
from kvstore.service import problems
from kvstore.service.models import Prompt, Read, parse_json
from kvstore.service.problems import Problem
from kvstore.service.stores import OpenStore

CONTENT_TYPE = "application/vnd.kvstore.pages"
FRAME = struct.Struct("<IHHIIQ")
_LENGTH = struct.Struct("<I")
MAX_PROMPT_BYTES = 16 << 20
READ_TIMEOUT_S = 30.0  # without a single byte

Opened = Callable[[Prompt], tuple[OpenStore, Request]]


async def send(request: web.Request, opened: OpenStore, prompt: Request, body: Read) -> web.StreamResponse:
    """Stream the stored pages of a prompt. The pages stay leased until they are sent."""
    store = opened.store
    match = await opened.wait_lookup(prompt, body.timeout_s)
    limit = match.num_blocks if body.num_blocks is None else min(match.num_blocks, body.num_blocks)
    lease = store.prepare_load(prompt, limit, owner="http")
    try:
        status = await opened.wait_for(lambda: _ended(store.poll(lease)), body.timeout_s) or store.poll(lease)
        pages = [page for page in lease.pages if page.block < status.num_blocks]
        sizes = [opened.layout.stored_bytes(page.group) for page in pages]
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE, "X-Blocks": str(status.num_blocks)})
        response.content_length = sum(sizes) + FRAME.size * len(pages)
        await response.prepare(request)
        for page, size in zip(pages, sizes, strict=True):
            view = store.slot_view(page.slot)[:size]
            checksum = xxhash.xxh3_64_intdigest(view)
            await response.write(FRAME.pack(page.block, page.group, 0, size, 0, checksum))
            await response.write(view)
        await response.write_eof()
        store.complete(lease)
        return response
    finally:
        store.release(lease)


async def receive(request: web.Request, opened_for: Opened) -> int:
    """Store the pages of a body; returns the blocks that became whole. Raises Problem."""
    body = _Body(request)
    (num_prompt,) = _LENGTH.unpack(await body.exactly(_LENGTH.size))
    if num_prompt > MAX_PROMPT_BYTES:
        raise Problem(413, "the prompt is too large", f"{num_prompt} bytes; at most {MAX_PROMPT_BYTES}", "prompt")
    try:
        prompt = Prompt.model_validate(parse_json(await body.exactly(num_prompt)))
    except ValidationError as error:
        raise problems.of_validation(error, "prompt") from None
    except ValueError as error:
        raise Problem(400, "the prompt is not JSON", str(error)[:200], "prompt") from None
    opened, blocks = opened_for(prompt)
    saving = _Saving(opened, blocks)
    try:
        while (head := await body.some(FRAME.size)) is not None:
            await saving.page(head, body)
        return saving.num_whole
    finally:
        saving.end()


@dataclass(slots=True)
class _Filling:
    """The lease of one block, and which of its pages have come."""

    lease: SaveLease
    have: set[int] = field(default_factory=set)


class _Saving:
    """Takes the pages of one body into slots, one lease per block."""

    def __init__(self, opened: OpenStore, request: Request) -> None:
        self.num_whole = 0
        self._opened = opened
        self._request = request
        self._filling: dict[int, _Filling] = {}

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
        filling = self._filling.get(block)
        if filling is None:
            lease = self._opened.store.prepare_save(self._request, block, 1, owner="http")
            filling = self._filling[block] = _Filling(lease)
        index = next((i for i, page in enumerate(filling.lease.pages) if page.group == group), None)
        if index is None or index in filling.have:
            await body.skip(size)
            return
        view = self._opened.store.slot_array(filling.lease.pages[index].slot)[:size]
        await body.into(view)
        if xxhash.xxh3_64_intdigest(view.data) != checksum:
            raise Problem(400, "the body is not valid", f"block {block}: the bytes have another checksum", "checksum")
        filling.have.add(index)
        if len(filling.have) == len(filling.lease.pages):
            self._opened.store.complete(filling.lease)
            self.num_whole += 1

    def end(self) -> None:
        """What is not whole is dropped."""
        for filling in self._filling.values():
            self._opened.store.release(filling.lease)


class _Body:
    """A request's body, taken in pieces as they come."""

    def __init__(self, request: web.Request) -> None:
        self._content = request.content
        self._rest = memoryview(b"")

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

    async def into(self, view: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Fill a slot."""
        at = 0
        while at < len(view):
            piece = await self._piece(len(view) - at)
            if not piece:
                raise Problem(400, "the body is not valid", "it ends within a page", "body")
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
                self._rest = memoryview(await asyncio.wait_for(self._content.readany(), READ_TIMEOUT_S))
            except asyncio.TimeoutError:
                raise Problem(400, "the body is not valid", f"nothing came for {READ_TIMEOUT_S} s", "body") from None
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece


def _ended(status: LeaseStatus) -> LeaseStatus | None:
    return None if status.state is LeaseState.WAITING else status
