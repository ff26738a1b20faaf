"""The connector's records of vLLM's requests: our request beside vLLM's, and how far each has come.

vLLM hashes its blocks itself; our request takes those hashes over as they are made. Used by the scheduler's half, on
the scheduler's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from connectors.vllm.layout import EngineLayout
from kvstore.base import HintOutcome, KVStore, LoadLease, Request, RequestOptions
from kvstore.errors import RequestError
from kvstore.prefix.answers import AnswerJudge
from kvstore.requests import check_options, check_reason

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

NEVER = 1 << 40  # more blocks than any prompt has


@dataclass(slots=True)
class Tracked:
    """The record of one of vLLM's requests.

    engine:     vLLM's request.
    store:      ours; it grows with the block hashes vLLM makes.
    finish_reason: why the reply will have ended, of whoever knows it better than vLLM; "" leaves it to vLLM.
    first:      blocks that vLLM's own cache had at the last question.
    promised:   blocks the request can start from, of the answer that was given.
    asked_at:   when it was first answered "ask again", but for what another request computes.
    look_at:    not to be looked up before, since it waits for that.
    most:       blocks that may be promised; less after a load of this request failed.
    is_aside:   the load that was promised is asynchronous.
    num_saved:  blocks that have been given to a save, or need none.
    is_mixed:   it began with blocks of vLLM's own cache that may have lost more than its names tell: none is saved.
    num_hashed: vLLM's hashes that are in `store`.
    judge:      of its answer, for the prompt of `judged` tokens, by the first `num_heard` tokens; None: not saved.
    by_tier:    blocks of the load by the tier they come from.
    outcomes:   what became of the hints that came with it.
    """

    engine: Any
    store: Request
    finish_reason: str = ""
    most: int = NEVER
    lease: LoadLease | None = None
    first: int = 0
    promised: int = 0
    asked_at: float | None = None
    look_at: float = 0.0
    is_loading: bool = False
    is_aside: bool = True
    num_saved: int = 0
    is_mixed: bool = False
    num_hashed: int = 0
    judge: AnswerJudge | None = None
    judged: int = -1
    num_heard: int = 0
    by_tier: dict[str, int] = field(default_factory=dict)
    outcomes: tuple[HintOutcome, ...] = ()


class Requests:
    """The requests of one engine, by vLLM's name of them.

    identify: names what makes a request's KV different and vLLM's hashes do not cover (its adapter's files).
    salt:     part of all names from now on; "" for none.
    on_named: told of new blocks of a request, by our names and by vLLM's.
    whole:    loads may take the last block of a prompt that ends on its border.
    """

    def __init__(
        self,
        store: KVStore,
        engine: EngineLayout,
        identify: Callable[[Any], str],
        single_flight: bool = False,
        whole: bool = False,
    ) -> None:
        self.salt = ""
        self.on_named: Callable[[Sequence[bytes], Sequence[bytes]], None] | None = None
        self._store = store
        self._per_block = engine.hashes_per_block
        self._identify = identify
        self._usual = RequestOptions(single_flight=single_flight, whole=whole)
        self._tracked: dict[str, Tracked] = {}

    def begin(self, request: Any) -> None:
        """A request came. One that this was not called for, or failed for, does not use the store."""
        if not _uses_store(request):
            return
        tenant = self._identify(request)
        if self.salt:
            tenant = f"{tenant}|{self.salt}"
        options, finish_reason = _options(request, replace(self._usual, tenant=tenant))
        made = self._store.request_from_hashes([], max(1, request.num_tokens), options)
        self._tracked[request.request_id] = Tracked(request, made, finish_reason)

    def get(self, name: str) -> Tracked | None:
        """The record of a request."""
        return self._tracked.get(name)

    def end(self, name: str) -> Tracked | None:
        """Forget a request; what was known of it."""
        return self._tracked.pop(name, None)

    def extend(self, tracked: Tracked) -> bool:
        """Take over the hashes that vLLM has made since; False if it took some back, and the request began anew."""
        hashes = tracked.engine.block_hashes
        per_block = self._per_block
        end = len(hashes) // per_block * per_block
        is_same = end >= tracked.num_hashed
        if not is_same:  # a streaming session took back its last tokens
            self._store.keep.finished(tracked.store)
            tracked.store = self._store.request_from_hashes([], tracked.engine.num_tokens, tracked.store.options)
            tracked.num_saved = min(tracked.num_saved, end // per_block)
            tracked.num_hashed = 0
        if end > tracked.num_hashed or tracked.engine.num_tokens > tracked.store.num_tokens:
            new = [bytes(one) for one in hashes[tracked.num_hashed + per_block - 1 : end : per_block]]
            self._store.extend_hashes(tracked.store, new, tracked.engine.num_tokens)
            tracked.num_hashed = end
            if self.on_named is not None and new:
                self.on_named(tracked.store.keys[-len(new) :], new)
        return is_same

    def __len__(self) -> int:
        return len(self._tracked)

    def __iter__(self) -> Iterator[Tracked]:
        return iter(list(self._tracked.values()))


def _uses_store(request: Any) -> bool:
    """Whether a request may use the store: not if it says {"kvstore": {"cache": false}} in kv_transfer_params."""
    params = getattr(request, "kv_transfer_params", None)
    hints = params.get("kvstore") if isinstance(params, dict) else None
    return not (isinstance(hints, dict) and hints.get("cache") is False)


def _options(request: Any, plain: RequestOptions) -> tuple[RequestOptions, str]:
    """The hints of vLLM's request: those under "kvstore" in kv_transfer_params; and the end that they tell of.

    They come from whoever sent the request, so those that make no sense are ignored, all of them but `exact`: what
    refuses loss is not to get it for a mistake beside.
    """
    hints: Any = None
    try:
        hints = (getattr(request, "kv_transfer_params", None) or {}).get("kvstore", {})
        plain = replace(plain, exact=hints.get("exact") is True)
        ttl_s = hints.get("ttl_s")
        options = replace(
            plain,
            session=str(hints.get("session", "")),
            priority=int(hints.get("priority", 0)),
            ttl_s=float(ttl_s) if ttl_s is not None and float(ttl_s) > 0 else None,
            retain_until=max(0.0, float(hints.get("retain_until", 0.0))),
            last_turn=hints.get("last_turn", False),
            exact=hints.get("exact", False),
        )
        check_options(options)  # not every text that JSON can spell is one, nor is every number
        return options, check_reason(hints.get("finish_reason", ""))
    except (AttributeError, TypeError, ValueError, OverflowError, RequestError) as error:
        log.warning("kvstore: hints %.200r of request %s are ignored: %s", hints, request.request_id, error)
        return plain, ""
