"""Which prompts went to an engine lately: an estimate of what it need not compute, for routers that ask.

vLLM does not tell what its cache holds of a prompt, and the store's names of blocks are vLLM's hashes. What this front
has sent there lately is there, or in its node's store. So the estimate is by tokens sent, bounded like the engine's own
cache; a wrong one sends a request to a replica that computes a little more, and nothing else depends on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK_TOKENS = 64


class SeenPrompts:
    """The last `max_tokens` tokens of prompts, in blocks. The loop's thread only; all is O(tokens of the prompt)."""

    def __init__(self, max_tokens: int) -> None:
        self._most = max(1, max_tokens // BLOCK_TOKENS)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, tokens: Sequence[int], salt: str) -> None:
        """A prompt goes to the engine."""
        for name in self._names(tokens, salt):
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def common(self, tokens: Sequence[int], salt: str) -> int:
        """Leading tokens of a prompt that were sent lately, whole blocks of them."""
        count = 0
        for name in self._names(tokens, salt):
            if name not in self._blocks:
                break
            count += BLOCK_TOKENS
        return count

    @staticmethod
    def _names(tokens: Sequence[int], salt: str) -> Iterator[int]:
        name = hash(salt)
        for first in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            name = hash((name, *tokens[first : first + BLOCK_TOKENS]))
            yield name
