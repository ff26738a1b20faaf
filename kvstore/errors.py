"""Every error this package raises on purpose.

Loud at the edges, quiet in the middle: construction and misuse raise one of these at once; on the data path a failure
becomes a miss and is counted, so that nothing of ours is raised inside an engine's step.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """The root of all errors of this package."""


class ConfigError(KVStoreError, ValueError):
    """Wrong at construction. The message names the field, the value and what would be right."""


class RequestError(KVStoreError, ValueError):
    """A call was given tokens, keys or options of the wrong type, shape or range."""


class LayoutMismatch(KVStoreError):
    """Stored pages come from another geometry, dtype or format version."""


class UnsupportedModel(KVStoreError):
    """A model keeps state that cannot be cut into pages (recurrent or convolutional layers)."""


class StoreClosed(KVStoreError):
    """The store was used after `close`."""


class TierError(KVStoreError):
    """A tier could not do what it was asked."""


class TierUnavailable(TierError):
    """The medium cannot be reached in time; the lane's circuit breaker counts these."""


class TierRefused(TierUnavailable):
    """The medium answered and will not do this kind of thing: it says nothing about the other kinds.

    reason: one word for counters, such as READONLY or ENOSPC.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class StoreForked(StoreClosed, TierUnavailable):
    """A forked child used what the process before it had opened. Open a store of its own in the child."""


class TierFull(TierError):
    """No room is left and nothing can be evicted."""


class CorruptPage(TierError):
    """A stored header, record or checksum does not fit the bytes."""
