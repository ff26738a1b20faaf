"""The duties of every connector, in the words of the store rather than of an engine.

A connector stands between one engine and one `KVStore`: it says how much of a prompt can be resumed, brings those
pages into the engine's memory, and hands new full blocks to the store without delaying the answer. Each engine has
its own idea of a cache, so the protocol is generic in `Target` (what a load fills) and `Source` (what a save reads).

The promise common to all of them: nothing of ours is raised inside an engine's step. What cannot be loaded is
computed, what cannot be saved is skipped, and both are counted in `ConnectorCounters`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

from kvstore.base import HOST, Request
from kvstore.errors import KVStoreError

Source = TypeVar("Source", contravariant=True)
Target = TypeVar("Target", covariant=True)


class Connector(Protocol[Target, Source]):
    """The six verbs between an engine and the store."""

    def matched_tokens(self, request: Request) -> int:
        """Return how many tokens of the prompt can be loaded; waits at most the lookup deadline. Never raises."""

    def start_load(self, request: Request, num_tokens: int) -> Target:
        """Bring the first `num_tokens` tokens into engine memory, or as many as arrive in time. Never raises."""

    def start_save(self, request: Request, source: Source) -> bool:
        """Hand new full blocks to the background; False if they were skipped. Returns at once and never raises."""

    def finished(
        self, request: Request, *, finish_reason: str = "", last_turn: bool = False, reply_tokens: int = -1
    ) -> None:
        """The request is over; `last_turn` lets its pages go first; -1 is an unknown length. Never raises."""

    def forget(self, request: Request) -> int:
        """Delete the prompt's pages in every tier that can be reached; return how many blocks."""

    def close(self) -> None:
        """Finish what is being saved and stop. Idempotent."""


@dataclass(slots=True)
class ConnectorCounters:
    """Events at the boundary, as plain numbers. Read without a lock; only the connector writes.

    loads, loaded_tokens:   requests that resumed from the store, and the tokens they did not compute.
    short_loads:            loads that got less than the lookup had promised (a page lost, late or corrupt).
    load_failures:          exceptions while loading; the request was computed instead.
    saves, saved_pages:     save jobs finished, and pages published.
    skipped_saves:          save jobs refused because the background queue was full.
    skipped_pages:          pages that found no free slot.
    save_failures:          exceptions while saving.
    unsaved_pages:          pages of answers that were left out because no next turn can begin with them (save "auto").
    bypassed:               requests that did not use the store because the model is not as it was (see `reasons`).
    """

    requests: int = 0
    loads: int = 0
    loaded_tokens: int = 0
    short_loads: int = 0
    load_failures: int = 0
    saves: int = 0
    saved_pages: int = 0
    skipped_saves: int = 0
    skipped_pages: int = 0
    save_failures: int = 0
    unsaved_pages: int = 0
    bypassed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """A copy for printing or exporting."""
        return asdict(self)


def resume_blocks(num_blocks: int, num_tokens: int, block_size: int, step_blocks: int = 1) -> int:
    """Cut a match to where an engine can resume: on a multiple of `step_blocks`, with a token left to compute.

    The last token of a prompt is always computed, since its logits are what the engine is after.

    >>> resume_blocks(8, 512, 64), resume_blocks(8, 513, 64), resume_blocks(7, 512, 64, step_blocks=4)
    (7, 8, 4)
    """
    most = max(0, num_tokens - 1) // block_size
    return min(num_blocks, most) // step_blocks * step_blocks


def tokens_by_tier(by_tier: Mapping[str, int], num_blocks: int, block_size: int) -> dict[str, int]:
    """Say where the tokens of `num_blocks` loaded blocks came from; the values add up to num_blocks * block_size.

    by_tier: blocks per tier as the lease granted them. Where fewer arrived, those missing are taken from the tiers
             below host memory, for it is there that pages are lost or late.
    """
    missing = sum(by_tier.values()) - num_blocks
    tokens: dict[str, int] = {}
    for tier, blocks in sorted(by_tier.items(), key=lambda item: item[0] == HOST):
        cut = min(max(missing, 0), blocks)
        missing -= cut
        tokens[tier] = (blocks - cut) * block_size
    return {tier: count for tier, count in tokens.items() if count}


def log_failure(log: logging.Logger, what: str, error: Exception) -> None:
    """Log a failure that became a miss; with its traceback where it is none of the store's own errors."""
    log.warning("%s: %s: %s", what, type(error).__name__, error, exc_info=not isinstance(error, KVStoreError))
