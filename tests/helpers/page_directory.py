"""A disk tier's directory with prompts in it, for the commands that look at one."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

from kvstore.page import PageKey, PageMeta, page_key
from kvstore.tiers.disk.tier import DiskTier

SLOT_BYTES = 8192
PAGE_BYTES = 8000
LAYOUT = "f" * 32


def open_directory(path: Path, num_slots: int = 64) -> DiskTier:
    """Open the directory for writing, making it if it is not there."""
    return DiskTier.open(path, LAYOUT, SLOT_BYTES, num_slots * SLOT_BYTES)


def store_prompt(tier: DiskTier, *words: str) -> list[PageKey]:
    """Store one page per word, chained like a prompt's blocks; return their keys, root first."""
    parent = b""
    keys, metas, views = [], [], []
    for depth, word in enumerate(words):
        block = hashlib.sha256(parent + word.encode()).digest()
        view = memoryview(mmap.mmap(-1, SLOT_BYTES))
        view[:PAGE_BYTES] = hashlib.shake_128(block).digest(PAGE_BYTES)
        keys.append(page_key(block))
        metas.append(PageMeta(PAGE_BYTES, parent, depth))
        views.append(view)
        parent = block
    assert all(tier.write_from(keys, views, metas, timeout_s=10.0))
    return keys


def make_directory(path: Path, *prompts: str) -> None:
    """Make a directory that holds `prompts` (words are blocks), and close it."""
    tier = open_directory(path)
    try:
        for prompt in prompts:
            store_prompt(tier, *prompt.split())
    finally:
        tier.close()


def flip_bit(path: Path, byte: int) -> None:
    """Flip one bit of the slab file, past everything that would notice."""
    with (path / "pages.slab").open("r+b") as slab:
        slab.seek(byte)
        old = slab.read(1)[0]
        slab.seek(byte)
        slab.write(bytes([old ^ 0x10]))
