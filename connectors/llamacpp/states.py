"""The states of llama-server's slots as pages of a store: what is stored of a prompt becomes a slot file, and a slot
file becomes pages.

    find    how much of a prompt is stored; `wait` where that takes time
    write   a slot file of that much, for the server to restore
    save    the blocks of a file that the server has written, of which the store lacks any

Pages are named by the tokens that the *server* wrote into the file, never by those that a client is believed to have
sent: a prompt that we tokenize otherwise than the server costs a hit, and no wrong byte. Calls block, but for `find`,
and may come from any thread. Only `save` raises, and that only UnsliceableState: what cannot be loaded is computed,
what cannot be saved is skipped, and both are counted.
"""

from __future__ import annotations

import logging
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from connectors.base import ConnectorCounters, log_failure, resume_blocks, tokens_by_tier
from connectors.llamacpp.identity import StateMaker
from connectors.llamacpp.slotfile import Bytes, Rows, SlotFile, StateShape, UnsliceableState, copy_in, prefix_head, read
from connectors.llamacpp.slotfile import row_places as places_of
from kvstore.base import KVStore, Match, Request, RequestOptions
from kvstore.config.sections import Config
from kvstore.errors import RequestError
from kvstore.opening import open_configured

log = logging.getLogger(__name__)

SAVE_BATCH_BLOCKS = 32  # slots held at once by a save, so that a long prompt does not empty the pool
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """What is stored of a prompt: its first `stored_tokens`, of which `num_tokens` can be resumed from.

    pending: tiers are being asked, which may have more.
    by_tier: of the latter, where they would come from.
    """

    request: Request | None = None
    num_tokens: int = 0
    stored_tokens: int = 0
    pending: bool = False
    by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestoreFile:
    """A slot file of the first `num_tokens` tokens of a prompt; by_tier says where they came from."""

    num_tokens: int = 0
    by_tier: dict[str, int] = field(default_factory=dict)


class SlotStates:
    """The pages of one server in one store."""

    @classmethod
    def open(cls, config: Config, maker: StateMaker, counters: ConnectorCounters) -> SlotStates:
        """Open the store that the configuration asks for. Raises ConfigError."""
        return cls(open_configured(config, maker.layout, maker.namespace), maker.shape, counters)

    def __init__(self, store: KVStore, shape: StateShape, counters: ConnectorCounters) -> None:
        self.store = store
        self.shape = shape
        self._counters = counters
        self._block_size = store.layout.block_size

    def find(self, tokens: Tokens, options: RequestOptions) -> StoredPrefix:
        """Look a prompt up. Does not wait: see `StoredPrefix.pending`. Raises RequestError for impossible options."""
        self._counters.requests += 1
        try:
            request = self.store.request(tokens, options)
            return self._found(request, self.store.lookup(request))
        except RequestError:
            raise
        except Exception as error:
            self._counters.load_failures += 1
            log_failure(log, "a lookup failed, the prompt is computed", error)
            return StoredPrefix()

    def wait(self, found: StoredPrefix) -> StoredPrefix:
        """Wait for tiers that are being asked, at most the lookup deadline."""
        if found.request is None or not found.pending:
            return found
        try:
            return self._found(found.request, self.store.wait_lookup(found.request))
        except Exception as error:
            self._counters.load_failures += 1
            log_failure(log, "a lookup failed, the prompt is computed", error)
            return StoredPrefix()

    def write(self, found: StoredPrefix, tokens: Tokens, path: Path) -> RestoreFile:
        """Load what was found and write it to `path`; waits at most the load deadline. Leaves no file if it fails."""
        if found.request is None or not found.num_tokens:
            return RestoreFile()
        wanted = found.num_tokens // self._block_size
        try:
            written = self._write(found.request, tokens, wanted, path)
        except Exception as error:
            self._counters.load_failures += 1
            log_failure(log, f"a load of {wanted} blocks failed, the prompt is computed", error)
            path.unlink(missing_ok=True)
            return RestoreFile()
        self._counters.short_loads += written.num_tokens < found.num_tokens
        return written

    def save(self, path: Path, options: RequestOptions, most_tokens: int) -> Tokens:
        """Store the blocks of a file that the store lacks; return the tokens of the slot.

        Raises UnsliceableState if the file is not of this server's shape, or has more tokens than the request can have
        left; OSError if it cannot be read.
        """
        # Read, not mapped: a file that somebody cuts short meanwhile must not end this process.
        data = np.fromfile(path, np.uint8)
        state = read(data)
        tokens: Tokens = state.tokens.copy()
        if state.shape != self.shape:
            raise UnsliceableState("the slot file is not as this server's were at its start; it is another server now")
        if len(tokens) > most_tokens:
            # Perhaps with an adapter of its own, which the tokens do not tell.
            raise UnsliceableState(
                f"the slot has {len(tokens)} tokens, its request left {most_tokens}: another client's"
            )
        if len(tokens) < self._block_size:
            return tokens
        try:
            request = self.store.request(state.tokens, options)
            for first in range(0, len(request.keys), SAVE_BATCH_BLOCKS):
                self._save_batch(state, request, first, min(SAVE_BATCH_BLOCKS, len(request.keys) - first))
            self._counters.saves += 1
            self.store.keep.finished(request, last_turn=options.last_turn)
        except Exception as error:
            self._counters.save_failures += 1
            log_failure(log, "the state of a slot was not saved", error)
        return tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Tell the store how fast the server computes, so that lookups can weigh loading against computing."""
        try:
            self.store.observe_prefill(num_tokens, seconds)
        except Exception as error:
            log_failure(log, "the speed of a prefill was not told", error)

    def finished(self, found: StoredPrefix, options: RequestOptions) -> None:
        """The request is over, and nothing of it is to be saved."""
        if found.request is None:
            return
        try:
            self.store.keep.finished(found.request, last_turn=options.last_turn)
        except Exception as error:
            log_failure(log, "the end of a request was not told", error)

    # ---- private ----------------------------------------------------------------------------------------------------

    def _found(self, request: Request, match: Match) -> StoredPrefix:
        blocks = resume_blocks(match.num_blocks, request.num_tokens, self._block_size)
        size = self._block_size
        by_tier = tokens_by_tier(match.by_tier, blocks, size)
        return StoredPrefix(request, blocks * size, match.num_blocks * size, match.pending, by_tier)

    def _write(self, request: Request, tokens: Tokens, wanted: int, path: Path) -> RestoreFile:
        lease = self.store.prepare_load(request, wanted)
        try:
            status = self.store.wait(lease)
            usable = min(wanted, status.num_blocks)
            if not usable:
                return RestoreFile()
            num_tokens = usable * self._block_size
            pieces = prefix_head(self.shape, tokens[:num_tokens])
            data, places = _new_file(path, pieces, num_tokens)
            for page in lease.pages:
                if page.block < usable:
                    first = page.block * self._block_size
                    source = self.store.slots.array(page.slot)
                    copy_in(source, self.shape, data, places, first, num_tokens, self._block_size)
            by_tier = tokens_by_tier(lease.by_tier, usable, self._block_size)
            self.store.complete(lease)
            return RestoreFile(num_tokens, by_tier)
        finally:
            self.store.release(lease)  # a no-op after complete

    def _save_batch(self, state: SlotFile, request: Request, first: int, num_blocks: int) -> None:
        lease = self.store.prepare_save(request, first, num_blocks)
        try:
            self._counters.skipped_pages += lease.skipped
            for page in lease.pages:
                state.copy_out(page.block * self._block_size, self._block_size, self.store.slots.array(page.slot))
            self.store.complete(lease)
            self._counters.saved_pages += len(lease.pages)
        finally:
            self.store.release(lease)  # a no-op after complete


def _new_file(path: Path, pieces: list[bytes | Rows], num_tokens: int) -> tuple[Bytes, tuple[int, ...]]:
    """Make the file with all but its rows; return its bytes, mapped, and the places of the rows."""
    placed = list(places_of(pieces, num_tokens))
    at, last = placed[-1]
    size = at + (last.token_bytes * num_tokens if isinstance(last, Rows) else len(last))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a full file system is an error here, and a signal in a mapping
        data = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
    finally:
        os.close(descriptor)
    places = []
    for at, piece in placed:
        if isinstance(piece, Rows):
            places.append(at)
        else:
            data[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
    return data, tuple(places)
