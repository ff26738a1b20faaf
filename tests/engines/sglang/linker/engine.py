"""One rank of SGLang as far as its cache goes: the real classes of the wheel, on the CPU, and a scheduler's steps.

The tree (`UnifiedRadixCache` with its Rust core), the wrapper, the factory that makes the linker, the allocator and the
pool are SGLang's. The forward is ours: it waits for each layer as attention does, compares the bytes of all tokens that
it did not compute with those it would have computed, and writes the others. KV is a function of the model, the rank,
the layer and all tokens up to its own, so one wrong page is seen.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_context

from tests.helpers.waiting import wait_until

PAGE = 16
LAYERS = 4
HEADS, DIM = 2, 8
SIZE = 1024  # tokens of the pool
MiB = 1 << 20
Tokens = list[int]

_rids = itertools.count(1)


@dataclass(eq=False)
class Req:
    """What a scheduler knows of a request; the first names are those that SGLang's classes read.

    device, loaded: tokens from the pool, and from the linker. slots: token slots of the whole prompt.
    """

    rid: str
    tokens: Tokens
    session: None = None
    kv: None = None
    swa_branching_seqlen: None = None
    extra_key: str | None = None
    last_node: Any = None
    prefix_len: int = 0
    device: int = 0
    loaded: int = 0
    promised: int = 0
    slots: Any = None
    lock: Any = None
    is_failed: bool = False
    is_wrong: bool = False
    skip_radix_cache_insert: bool = False
    discard_output_reason: Any = None
    log: list[str] = field(default_factory=list)


def linker_flags(extra: Mapping[str, Any]) -> dict[str, Any]:
    """`--unified-cache-external-linker-config`."""
    named = {"weights": "those of the test", **extra}
    return {"linker": "KVStoreLinker", "linker_module_path": "connectors.sglang_linker", "linker_extra_config": named}


class LinkerEngine:
    """One rank. group: SGLang's process group of all ranks; None for one rank alone. kind: "mha" or "mla"."""

    def __init__(
        self,
        extra: Mapping[str, Any],
        *,
        size: int = SIZE,
        group: Any = None,
        rank: int = 0,
        kind: str = "mha",
        model: int = 1,
    ) -> None:
        self.size, self.rank, self.model, self.kind = size, rank if kind == "mha" else 0, model, kind
        self._context = get_context().override_server_args()
        self.server_args = self._context.install()
        self.pool = make_pool(kind, size)
        self.allocator = PagedTokenToKVPoolAllocator(
            size, PAGE, torch.bfloat16, "cpu", kvcache=self.pool, need_sort=False
        )
        self.params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(16, 4096, "cpu", False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE,
            tree_components=(ComponentType.FULL,),
            tp_cache_group=group,
        )
        self.cache = UnifiedRadixCache(self.params)
        self.linker: Any = None
        self.attach(extra)

    # ---- SGLang's registry ----------------------------------------------------------------------------------------

    def attach(self, extra: Mapping[str, Any]) -> None:
        """Make a linker as SGLang does at its start."""
        self.linker = create_unified_cache_linker(
            self.server_args,
            self.params,
            backend="dynamic",
            config=linker_flags(extra),
            components=set(self.cache.components),
            forward_stream=None,
        )
        self.cache.init_cache_linker(self.linker)
        self.counter = self.cache.linker.layer_done_counter
        self.pool.register_layer_transfer_counter(self.counter)

    # ---- a scheduler's steps --------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, req: Req | None = None) -> Req:
        """Look a request up, as each scheduling pass does for those that wait."""
        req = req or Req(f"r{next(_rids)}", tokens)
        key = RadixKey(array("q", tokens[:-1]))  # the last token is always computed
        match = self.cache.match_prefix(MatchPrefixParams(key=key, req=req))
        req.last_node, req.device, req.promised = match.last_device_node, match.device_prefix_len, match.host_hit_length
        req.log.append(f"match {req.device}+{req.promised}")
        self._best = match.best_match_node
        return req

    def admit(self, tokens: Tokens, req: Req | None = None) -> Req | None:
        """Look a request up and put it into the batch; None where there is no room in the pool."""
        req = self.match(tokens, req)
        req.lock = self.cache.inc_lock_ref(req.last_node).to_dec_params()
        req.loaded = 0
        if req.promised:
            params = InitLoadBackParams(self._best, req.promised, req=req)
            req.loaded, _ = self.cache.init_load_back(params)
        req.prefix_len = req.device + req.loaded
        prefix = self.cache.prefix_device_indices(req)
        need = -(-len(tokens) // PAGE) * PAGE - req.prefix_len
        short = need - self.allocator.available_size()
        if short > 0:
            self.cache.evict(EvictParams(num_tokens=short))
        rest = self.allocator.alloc(need)
        if rest is None:
            req.slots = prefix
            self.abort(req)
            return None
        req.slots = torch.cat([prefix, rest])
        for buffer in (rows for layer in range(LAYERS) for rows in self._rows(layer)):
            raw(buffer)[req.slots[req.device :]] = -1  # slots come back with what they had: nothing may pass by that
        return req

    def abort(self, req: Req) -> None:
        """A client went away before the batch began."""
        self.cache.release_aborted_request(CacheRequestHandle(req.rid, 0))
        self._free(req.slots[req.device :])
        self.cache.dec_lock_ref(req.last_node, req.lock)

    def forward(self, *reqs: Req) -> list[Req]:
        """Run a batch; returns the requests whose load failed."""
        index = self.cache.ready_to_load_host_cache()
        self.counter.set_consumer(index)
        for layer in range(LAYERS):
            buffers = buffers_of(self.pool, layer)
            for req in reqs:
                for which, buffer in enumerate(buffers):
                    rows = kv_rows(self, req.tokens, layer, which)
                    slots = req.slots[: len(req.tokens)]
                    if not torch.equal(raw(buffer)[slots[: req.prefix_len]], rows[: req.prefix_len]):
                        req.is_wrong = True
                    raw(buffer)[slots[req.prefix_len :]] = rows[req.prefix_len :]
        failed: list[Req] = self.cache.finish_external_linker_loads(list(reqs))
        for req in failed:
            req.is_failed = True
        for req in reqs:
            assert req.is_failed or not req.is_wrong, (req.rid, req.log)
        return failed

    def finish(self, req: Req) -> None:
        """The end of a request: its pages go to the tree, unless its load failed."""
        if req.skip_radix_cache_insert:
            self._free(req.slots[req.device :])
        else:
            end = len(req.tokens) // PAGE * PAGE
            key = RadixKey(array("q", req.tokens[:end]))
            # The tree frees what it has twice, from prev_prefix_len on.
            self.cache.insert(InsertParams(key=key, value=req.slots[:end], prev_prefix_len=req.device))
            self._free(req.slots[end:])
        self.cache.dec_lock_ref(req.last_node, req.lock)
        self.events()

    def run(self, tokens: Tokens) -> Req:
        """One request alone, from its lookup to its end."""
        req = self.admit(tokens)
        assert req is not None
        self.forward(req)
        self.finish(req)
        return req

    def events(self) -> None:
        """What each of a scheduler's steps begins with."""
        self.cache.check_hicache_events()

    def settle(self) -> None:
        """Step until every offload has ended."""

        def is_settled() -> bool:
            self.events()
            return not self.cache.linker.pending_offloads

        wait_until(is_settled)

    def flush(self) -> None:
        """`/flush_cache`: forget all that the pool has."""
        self.cache.reset()
        self.allocator.clear()

    def evict_all(self) -> None:
        """Evict all that no request holds."""
        self.cache.evict(EvictParams(num_tokens=self.size))

    # ---- checks ---------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Any:
        return self.linker.core

    def check(self, *, is_idle: bool = True) -> None:
        """SGLang's own checks, and ours: no slot is lost, no lease is left."""
        held = self.cache.protected_size()
        total = self.allocator.available_size() + self.cache.evictable_size() + held
        if is_idle:
            self.cache.sanity_check()
            assert (total, held) == (self.size, 0), (total, held, self.size)
            assert not self.core.counters["errors"], self.core.counters
            self.core.promises.clear()
            self.check_leases()

    def check_leases(self) -> None:
        """No page is pinned any more."""
        store = self.core.store
        if hasattr(store, "check"):
            store.check()
        stats = store.stats()
        assert (stats["leases"], stats["pinned_pages"]) == (0, 0), stats

    def close(self) -> None:
        """The engine stops."""
        with suppress(Exception):
            self.pool.register_layer_transfer_counter(None)
        if self.cache.linker is not None:
            self.cache.release_host_resources()
        self._context.restore()

    def _rows(self, layer: int) -> Sequence[Any]:
        """A layer's rows, without waiting for them."""
        return (
            (self.pool.kv_buffer[layer],)
            if self.kind == "mla"
            else (self.pool.k_buffer[layer], self.pool.v_buffer[layer])
        )

    def _free(self, slots: Any) -> None:
        if len(slots):
            self.allocator.free(slots)


def make_pool(kind: str, size: int = SIZE) -> Any:
    """SGLang's pool on the CPU."""
    if kind == "mla":
        return MLATokenToKVPool(size, PAGE, torch.bfloat16, 12, 4, LAYERS, "cpu", False)
    return MHATokenToKVPool(
        size=size,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


def buffers_of(pool: Any, layer: int) -> Sequence[Any]:
    """A layer's rows, as attention asks for them: waits until they have come."""
    if isinstance(pool, MLATokenToKVPool):
        return (pool.get_key_buffer(layer),)
    return pool.get_key_buffer(layer), pool.get_value_buffer(layer)


def raw(buffer: Any) -> Any:
    """Rows as the bits of their numbers."""
    return buffer.view(torch.int16).reshape(buffer.shape[0], -1)


def kv_rows(engine: LinkerEngine, tokens: Sequence[int], layer: int, which: int) -> Any:
    """What the model computes for each token: bits that depend on all tokens up to it."""
    width = 16 if engine.kind == "mla" else HEADS * DIM
    seed = ((engine.model * 64 + engine.rank) * LAYERS + layer) * 2 + which + 1
    mask, value = (1 << 64) - 1, seed
    states = np.empty(len(tokens), np.uint64)
    for index, token in enumerate(tokens):
        value = (value * 6364136223846793005 + token + 1442695040888963407) & mask
        states[index] = value
    factors = (np.arange(width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (states[:, None] * factors) >> np.uint64(48)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16))


def prompt(seed: int, num_tokens: int) -> Tokens:
    """A prompt of random tokens."""
    return np.random.default_rng(seed).integers(0, 30_000, num_tokens).tolist()
