"""The answer to one request inside a replica: pieces of text as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.cluster.admission import Ticket

if TYPE_CHECKING:
    from connectors.transformers.report import Report
    from connectors.transformers.run import GenerationRun


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The text that became certain with one token; finish_reason: "stop" or "length" with the last one."""

    text: str
    finish_reason: str | None = None


class ReplicaAnswer(AsyncIterator[TextPiece]):
    """One request inside: its pieces as they come. Raises, while iterated, what made it fail. The loop's thread only.

    queue_s: from its arrival until its first step; ttft_s: until its first token was known.
    """

    def __init__(self, run: GenerationRun, ticket: Ticket, arrived: float) -> None:
        self.run = run
        self.ticket = ticket
        self.arrived = arrived
        self.queue_s = 0.0
        self.ttft_s = 0.0
        self.is_cancelled = False
        self.is_over = False
        self._pieces: asyncio.Queue[TextPiece | Exception | None] = asyncio.Queue()

    @property
    def report(self) -> Report:
        """The origin of the prompt's tokens and the times taken; complete after the last piece."""
        return self.run.report

    def put(self, text: str, finish_reason: str | None) -> None:
        """Hand a piece to whoever iterates."""
        self._pieces.put_nowait(TextPiece(text, finish_reason))

    def end(self, error: Exception | None = None) -> None:
        """There will be no further piece. Idempotent."""
        if not self.is_over:
            self.is_over = True
            self._pieces.put_nowait(error)

    async def __anext__(self) -> TextPiece:
        item = await self._pieces.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item
