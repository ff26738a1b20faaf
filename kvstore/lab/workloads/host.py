"""Save and load through a whole store whose only tier is host memory, over memcpy of the same bytes.

Saving copies engine memory into slots of a lease, loading copies them out again: what is above memcpy is the store's
own cost.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import numpy.typing as npt

from kvstore.build import open_store
from kvstore.config import Config
from kvstore.lab.bench import Case, Table, measure
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.records import Request
from kvstore.store import LocalStore
from kvstore.units import KiB, MiB
from radix.namespace import Namespace

BLOCK_SIZE = 64
PAGE_SIZES = (256 * KiB, 2 * MiB)
PROMPT_PAGES = 32
PROMPTS_THAT_FIT = 4

Pages = npt.NDArray[np.uint8]


def run(argument: str, quick: bool) -> list[Table]:
    """Measure pages of 256 KiB and 2 MiB; the store is full, so that every save evicts."""
    return [_measure(page_bytes, quick) for page_bytes in PAGE_SIZES]


def _layout(page_bytes: int) -> Layout:
    return Layout(BLOCK_SIZE, (LayerGroup(GroupKind.FULL, (0,), page_bytes),), "bench", "uint8")


def _measure(page_bytes: int, quick: bool) -> Table:
    layout = _layout(page_bytes)
    namespace = Namespace("bench", "1", layout.dtype, layout.fingerprint, BLOCK_SIZE)
    config = Config(host={"capacity_bytes": PROMPTS_THAT_FIT * PROMPT_PAGES * page_bytes})
    engine, elsewhere = (np.ones((PROMPT_PAGES, page_bytes), np.uint8) for _ in range(2))
    starts = count(0, PROMPT_PAGES * BLOCK_SIZE)
    with open_store(config, layout, namespace) as store:
        requests: list[Request] = []

        def new_prompt() -> None:
            start = next(starts)
            # One token more than the pages hold: an engine has to compute at least one.
            tokens = np.arange(start, start + PROMPT_PAGES * BLOCK_SIZE + 1, dtype=np.uint32)
            requests.append(store.request(tokens))

        def memcpy() -> None:
            for page in range(PROMPT_PAGES):
                np.copyto(elsewhere[page], engine[page])

        for _ in range(PROMPTS_THAT_FIT):
            new_prompt()
            _save(store, requests[-1], engine)
        num_bytes = PROMPT_PAGES * page_bytes
        cases = [
            Case("memcpy (np.copyto, a page at a time)", memcpy, num_bytes),
            Case("save: lease, copy in, publish", lambda: _save(store, requests[-1], engine), num_bytes, new_prompt),
            Case("load: lookup, lease, copy out, release", lambda: _load(store, requests[-1], engine), num_bytes),
        ]
        return measure(f"{PROMPT_PAGES} pages of {page_bytes // KiB} KiB", "bytes", cases, quick=quick)


def _save(store: LocalStore, request: Request, engine: Pages) -> None:
    lease = store.prepare_save(request, 0, PROMPT_PAGES)
    if len(lease.pages) != PROMPT_PAGES:
        raise RuntimeError(f"bench host: {len(lease.pages)} of {PROMPT_PAGES} pages found a slot")
    for page in lease.pages:
        np.copyto(store.slot_array(page.slot), engine[page.block])
    store.complete(lease)


def _load(store: LocalStore, request: Request, engine: Pages) -> None:
    match = store.lookup(request)
    lease = store.prepare_load(request, match.num_blocks)
    if len(lease.pages) != PROMPT_PAGES:
        raise RuntimeError(f"bench host: {len(lease.pages)} of {PROMPT_PAGES} pages were found again")
    for page in lease.pages:
        np.copyto(engine[page.block], store.slot_array(page.slot))
    store.complete(lease)
