"""An engine in forty lines: what it asks of a store, in the order in which it asks.

python examples/engine.py disk.path=/tmp/kv disk.capacity_bytes=64MiB   # run it twice: the second hits
"""

import sys

import numpy as np

from kvstore import Config, GroupKind, LayerGroup, Layout, LoadLease, Match, Namespace, open_store

BLOCK, LAYERS, PAGE_BYTES = 16, 2, 8192
layout = Layout(BLOCK, (LayerGroup(GroupKind.FULL, tuple(range(LAYERS)), PAGE_BYTES),), "example:bytes", "uint8")
namespace = Namespace("example-model", "1", layout.dtype, layout.fingerprint, BLOCK)


def compute(tokens: np.ndarray, block: int) -> np.ndarray:
    """Stand in for a forward pass: bytes that follow from the tokens up to the block's end."""
    return np.random.default_rng(tokens[: (block + 1) * BLOCK].tolist()).integers(0, 256, PAGE_BYTES, np.uint8)


def prefill(store, tokens: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """Return how many blocks were loaded, and the pages of all."""
    request = store.request(tokens)
    pages: list[np.ndarray] = []
    match: Match = store.wait_lookup(request)
    lease: LoadLease = store.prepare_load(request, match.num_blocks)
    try:
        loaded = store.wait(lease).num_blocks  # fewer than matched, if a tier was too slow
        pages += [store.slots.array(slot)[:PAGE_BYTES].copy() for block, _, slot in lease.pages if block < loaded]
    finally:
        store.complete(lease)
    pages += [compute(tokens, block) for block in range(loaded, len(request.keys))]
    save = store.prepare_save(request, loaded, len(request.keys) - loaded)
    for block, _, slot in save.pages:
        np.copyto(store.slots.array(slot)[:PAGE_BYTES], pages[block])
    store.complete(save)
    store.keep.finished(request)
    return loaded, pages


if __name__ == "__main__":
    store = open_store(Config.load(**dict(pair.split("=", 1) for pair in sys.argv[1:])), layout, namespace)
    print("loaded", prefill(store, np.arange(10 * BLOCK + 1))[0], "of 10 blocks")
    store.close(10.0)
