"""Tokens to block hashes: a chain, so that one hash names a block together with everything before it.

    key[i] = H(key[i - 1] || tokens of block i as little-endian uint32),  key[-1] = the namespace's root

H is SHA-256 (32 bytes): tenants share a store, and a collision would hand one of them another's prompt. "xxh3_128"
(16 bytes) is for a single tenant only; collisions can be made on purpose there, so the caller keeps the tokens and
compares them on every hit. The same tokens give the same hashes in every process and on every machine;
docs/formats.md has test vectors.

One call into C (`radix._chain`, optional) hashes a whole prompt; a twin on hashlib gives the same bytes about four
times slower. Measured, 128K tokens in blocks of 16, CPU ms: C 1.1 (4.0 without SHA instructions); hashlib 4.3;
xxh3_128 from Python 1.4, so there is little to gain from it in C. A list of ids costs 0.8 to turn into an array
first, an array nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from radix.namespace import HASHES, BlockHash, Namespace, check_algorithm, check_block_size
from radix.tokens import TokenArray, as_tokens

if TYPE_CHECKING:
    from types import ModuleType

_chain: ModuleType | None
try:
    from radix import _chain
except ImportError:  # not built on this machine: the twins below do the same
    _chain = None

__all__ = [
    "HASHES",
    "ROOT_BYTES",
    "BlockHash",
    "BlockHasher",
    "Namespace",
    "as_tokens",
    "bind_hashes",
    "hash_blocks",
]

ROOT_BYTES = 32
_NO_TOKENS = np.empty(0, dtype=np.uint32)


def hash_blocks(tokens: Any, block_size: int, *, root: BlockHash, algorithm: str = "sha256") -> list[BlockHash]:
    """Chain-hash the full blocks of `tokens`.

    tokens: whatever `as_tokens` takes, T of them. The tail shorter than `block_size` is not hashed: T // block_size
            hashes return.
    root:   of the namespace, or the hash of the block before the first token. Equal tokens under different roots
            never collide.
    """
    check_block_size(block_size)
    check_algorithm(algorithm)
    values = as_tokens(tokens)
    return _chain_blocks(values[: len(values) // block_size * block_size], block_size, root, algorithm)


def bind_hashes(root: BlockHash, hashes: Sequence[bytes]) -> list[BlockHash]:
    """Bind hashes an engine made to a namespace: SHA-256(root || hash) each.

    The engine's hashes must be chained themselves, and name everything but the namespace that a block's KV depends on.
    Raises TypeError if one of them is not bytes, ValueError if the root is not 32 bytes.
    """
    _check_root(root)
    if _chain is not None:
        bound: list[BlockHash] = _chain.bind_sha256(root, hashes)
        return bound
    return bind_twin(root, hashes)


class BlockHasher:
    """Hashes a prompt as it grows: every token is hashed once, however often `extend` is called.

    keys:        hashes of all full blocks so far, root first; the list grows in place.
    num_tokens:  tokens seen, with those of the unfinished block.
    token_bytes: with `keep_tokens`, the full blocks' tokens as little-endian uint32; None otherwise.

    Holds no reference to the arrays it is given. Not thread-safe.
    """

    __slots__ = ("_algorithm", "_block_size", "_root", "_tail", "keys", "num_tokens", "token_bytes")

    def __init__(
        self, root: BlockHash, block_size: int, algorithm: str = "sha256", *, keep_tokens: bool = False
    ) -> None:
        check_block_size(block_size)
        check_algorithm(algorithm)
        _check_root(root)
        self._root = root
        self._block_size = block_size
        self._algorithm = algorithm
        self._tail: TokenArray = _NO_TOKENS
        self.keys: list[BlockHash] = []
        self.num_tokens = 0
        self.token_bytes: bytearray | None = bytearray() if keep_tokens else None

    def extend(self, tokens: Any) -> list[BlockHash]:
        """Append `tokens` (whatever `as_tokens` takes) and return the hashes of the blocks they fill."""
        values = as_tokens(tokens)
        self.num_tokens += len(values)
        if len(self._tail):
            values = np.concatenate((self._tail, values))
        num_full = len(values) // self._block_size * self._block_size
        full, self._tail = values[:num_full], values[num_full:].copy()
        new = _chain_blocks(full, self._block_size, self.keys[-1] if self.keys else self._root, self._algorithm)
        self.keys += new
        if self.token_bytes is not None:
            self.token_bytes += _little_endian(full).tobytes()
        return new


def chain_twin(root: BlockHash, blocks: memoryview, block_bytes: int) -> list[BlockHash]:
    """`_chain.chain_sha256` in Python: the hashes of `blocks`, cut every `block_bytes`."""
    data = blocks.tobytes()
    sha256 = hashlib.sha256
    keys: list[BlockHash] = []
    key: bytes = root
    for start in range(0, len(data), block_bytes):
        key = sha256(key + data[start : start + block_bytes]).digest()
        keys.append(BlockHash(key))
    return keys


def bind_twin(root: BlockHash, hashes: Sequence[bytes]) -> list[BlockHash]:
    """`_chain.bind_sha256` in Python."""
    for at, engine_hash in enumerate(hashes):
        if not isinstance(engine_hash, bytes):
            raise TypeError(f"hashes[{at}] is {type(engine_hash).__name__}; it must be bytes")
    sha256 = hashlib.sha256
    return [BlockHash(sha256(root + engine_hash).digest()) for engine_hash in hashes]


def _chain_blocks(full: TokenArray, block_size: int, before: BlockHash, algorithm: str) -> list[BlockHash]:
    """Hash whole blocks; `before` is the root or the hash of the block before them."""
    if not len(full):
        return []
    blocks = _little_endian(full).data.cast("B")
    if algorithm == "xxh3_128":
        return _chain_xxh3(before, blocks, 4 * block_size)
    _check_root(before)
    if _chain is not None:
        keys: list[BlockHash] = _chain.chain_sha256(before, blocks, 4 * block_size)
        return keys
    return chain_twin(before, blocks, 4 * block_size)


def _chain_xxh3(before: bytes, blocks: memoryview, block_bytes: int) -> list[BlockHash]:
    data = blocks.tobytes()
    digest = xxhash.xxh3_128_digest
    keys: list[BlockHash] = []
    for start in range(0, len(data), block_bytes):
        before = digest(before + data[start : start + block_bytes])
        keys.append(BlockHash(before))
    return keys


def _little_endian(values: TokenArray) -> TokenArray:
    return values.astype("<u4", copy=False)  # a copy only on big-endian machines


def _check_root(root: bytes) -> None:
    if len(root) != ROOT_BYTES:
        raise ValueError(f"root is {len(root)} bytes; it must be {ROOT_BYTES} (Namespace.root())")
