"""The most that may be lost of a page, as part of its name.

A request whose reader takes pages of a lossy class names its blocks by other hashes than one that does not: the first
24 bytes of a block's hash, then a mark of eight bytes with the class. So in every index and on every medium these are
other pages: an exact reader finds none that was ever lossy, nor one computed after such a page. Exact names are what
they have always been.

    exact    0   the page's own bytes, also under the codec `lossless`
    near     1   8 bits an element
    compact  2   6 bits
    small    3   4 bits

The hard thing: an exact hash could end like a mark. Its chance is 2^-64 a block, that of a collision of 64 bits, for
tokens that an attacker chooses at that price; 24 bytes are still 192 bits against collisions.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from kvstore.errors import ConfigError
from radix.hashing import BlockHash

HASH_KEPT = 24
MARK = b"kvloss\0"  # and the class, one byte


class Loss(IntEnum):
    """A class of loss; a reader of one takes those below it."""

    EXACT = 0
    NEAR = 1
    COMPACT = 2
    SMALL = 3

    @property
    def word(self) -> str:
        """The name in configurations and reports."""
        return self.name.lower()


_LOSSY = {MARK + bytes([loss]): loss for loss in Loss if loss}


def loss_of_codec(codec: str) -> Loss:
    """The class of what a codec of this name gives back. Raises ConfigError for a name that is none."""
    if codec == "lossless":
        return Loss.EXACT
    for loss in Loss:
        if loss.word == codec:
            return loss
    raise ConfigError(
        f"codec is {codec!r}; it must be one of exact, lossless, {', '.join(loss.word for loss in Loss if loss)}"
    )


def loss_of(block_hash: bytes) -> Loss:
    """The class in the name of a block, or at the start of a page key."""
    return _LOSSY.get(block_hash[HASH_KEPT : HASH_KEPT + 8], Loss.EXACT)


def marked(hashes: Iterable[bytes], loss: Loss) -> list[BlockHash]:
    """The names of blocks for readers that take this class; exact ones as they are."""
    if loss is Loss.EXACT:
        return [BlockHash(block_hash) for block_hash in hashes]
    mark = MARK + bytes([loss])
    return [BlockHash(block_hash[:HASH_KEPT] + mark) for block_hash in hashes]
