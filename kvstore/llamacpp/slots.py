"""The slots of one llama-server: which are free, and what each of them holds.

A slot holds the tokens of the request that was in it last, and the server takes the longest common prefix of them for
the next one. What it holds is known here only as far as it was seen: the prompt, and after it perhaps an answer.

The hard thing: other clients of the server may use its slots too, with adapters or a shifted context, and what they
leave behind must not be stored as if it had been computed from the tokens alone. So each answer is compared with what
the slot could have: more is not ours, and is not stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
NOTHING: Tokens = np.empty(0, np.int32)
ANY_NUMBER = 1 << 30


@dataclass(slots=True)
class LlamaSlot:
    """One slot.

    tokens:   what it has for certain if anything.
    tenant:   whose tokens are in it, also of those that are not known; None if that is not known.
    tail:     how many unknown tokens may follow them.
    is_clean: nothing but these tokens went into it; else it has to be emptied before its next use.
    """

    id: int
    tokens: Tokens = field(default_factory=lambda: NOTHING)
    tail: int = 0
    tenant: str | None = ""
    is_clean: bool = False
    last_used: int = 0

    def common(self, tokens: Tokens, tenant: str) -> int:
        """Leading tokens of a prompt that the slot has for certain, if it has what it had last."""
        return common_prefix(self.tokens, tokens) if self.is_clean and tenant == self.tenant else 0

    def most(self, tokens: Tokens, tenant: str) -> int:
        """Leading tokens of a prompt that the slot may have at the most."""
        common = self.common(tokens, tenant)
        return common + self.tail if common == len(self.tokens) else common

    def holds(self, tokens: Tokens, tenant: str, tail: int = 0) -> None:
        """It has these tokens now."""
        self.tokens, self.tenant, self.tail, self.is_clean = tokens, tenant, tail, True

    def spoil(self) -> None:
        """Nothing is known of what it has."""
        self.tokens, self.tail, self.is_clean = NOTHING, 0, False


class LlamaSlots:
    """All slots. Its event loop only. num_waiting: requests that wait for one."""

    def __init__(self, num_slots: int) -> None:
        self.slots = [LlamaSlot(number) for number in range(num_slots)]
        self.num_waiting = 0
        self._free = list(self.slots)
        self._freed = asyncio.Condition()
        self._uses = 0

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    async def take(self, tokens: Tokens, tenant: str, stored: int, block_size: int) -> LlamaSlot:
        """Wait for a slot, and take the best: one that has more of the prompt than is stored, else the longest unused.

        stored: tokens of the prompt that a restore would bring.
        """
        self.num_waiting += 1
        try:
            async with self._freed:
                await self._freed.wait_for(lambda: self._free)
                best = max(self._free, key=lambda slot: (slot.common(tokens, tenant), -slot.last_used))
                if best.common(tokens, tenant) < max(stored, block_size):
                    best = min(self._free, key=lambda slot: slot.last_used)
                self._free.remove(best)
        finally:
            self.num_waiting -= 1
        self._uses += 1
        best.last_used = self._uses
        return best

    async def give(self, slot: LlamaSlot) -> None:
        """Give a slot back."""
        async with self._freed:
            self._free.append(slot)
            # All: one that is woken and cancelled at once passes its turn on to nobody before Python 3.13.
            self._freed.notify_all()


def common_prefix(a: Tokens | Sequence[int], b: Tokens | Sequence[int]) -> int:
    """Return how many leading tokens are equal."""
    most = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:most]) != np.asarray(b[:most]))
    return int(differ[0]) if len(differ) else most
