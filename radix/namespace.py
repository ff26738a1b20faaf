"""The namespace: everything but the tokens that a page's bytes depend on, as the root of all block hashes.

Made once, by whoever wires a store; its root goes into `hash_blocks`. Two namespaces that differ in any field share no
block hash, so a page of another model, geometry or tenant is a miss and needs no check of its own.

The hard thing: the encoding must be injective (no two namespaces give the same bytes) and the same on every machine
and in every version. It is length-framed, versioned and written down in docs/formats.md, with test vectors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import NewType

BlockHash = NewType("BlockHash", bytes)

HASHES = ("sha256", "xxh3_128")

ENCODING_VERSION = 1
_DOMAIN = b"kvtiers block namespace"


@dataclass(frozen=True, slots=True)
class Namespace:
    """The values that must be equal for two engines to share pages.

    model:      name of the model, e.g. the hub id.
    revision:   commit of the weights or a fingerprint of them.
    dtype:      element type of the KV, e.g. "bfloat16".
    layout:     fingerprint of the page layout.
    block_size: tokens per block.
    adapter:    LoRA or other adapter, "" for none.
    salt:       tenant; tenants never see each other's pages.
    hash:       how blocks are hashed, one of HASHES.
    extra:      further (name, value) pairs, e.g. the engine's own hash function or multimodal settings. Their order
                does not matter; a name may appear once.

    Raises TypeError or ValueError naming the field, the value and what would be right.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    block_size: int
    adapter: str = ""
    salt: str = ""
    hash: str = "sha256"
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("block_size", "extra") and not isinstance(value, str):
                raise TypeError(f"namespace: {field.name} is {value!r}; it must be a str")
        check_block_size(self.block_size, "namespace: block_size")
        check_algorithm(self.hash, "namespace: hash")
        for pair in self.extra:
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
                raise TypeError(f"namespace: extra has {pair!r}; it must hold (name, value) tuples of str")
        names = [name for name, _ in self.extra]
        if len(set(names)) < len(names):
            raise ValueError(f"namespace: extra names {sorted(names)} are not unique; give each name once")

    def root(self) -> BlockHash:
        """Return the hash that stands before the first block, 32 bytes: SHA-256 of the canonical encoding."""
        return BlockHash(hashlib.sha256(self.encode()).digest())

    def encode(self) -> bytes:
        """Return the canonical bytes that `root` hashes; docs/formats.md describes them."""
        named = [
            (field.name, str(getattr(self, field.name))) for field in fields(self) if field.name != "extra"
        ]  # declaration order: part of the format
        parts = [_frame(_DOMAIN), _u32(ENCODING_VERSION)]
        for pairs in (named, sorted(self.extra)):
            parts.append(_u32(len(pairs)))
            parts += [_frame(name.encode()) + _frame(value.encode()) for name, value in pairs]
        return b"".join(parts)

    def with_salt(self, salt: str) -> Namespace:
        """Return this namespace for another tenant."""
        return replace(self, salt=salt)


def check_block_size(block_size: int, name: str = "block_size") -> None:
    """Raise TypeError or ValueError unless `block_size` is an int of at least 1 that a u32 can hold."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"{name} is {block_size!r}; it must be an int, in tokens")
    if not 1 <= block_size < 1 << 32:
        raise ValueError(f"{name} is {block_size}; it must be at least 1 token (usual: 16 to 256) and below 2**32")


def check_algorithm(algorithm: str, name: str = "algorithm") -> None:
    """Raise ValueError unless `algorithm` is one of HASHES."""
    if algorithm not in HASHES:
        raise ValueError(f"{name} is {algorithm!r}; it must be one of {', '.join(HASHES)}")


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _frame(data: bytes) -> bytes:
    return _u32(len(data)) + data
