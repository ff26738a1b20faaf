"""Types of the optional C extension; `radix.hashing` has its Python twins."""

from collections.abc import Sequence

from typing_extensions import Buffer

from radix.namespace import BlockHash

def chain_sha256(root: bytes, blocks: Buffer, block_bytes: int, *, portable: bool = False) -> list[BlockHash]: ...
def bind_sha256(root: bytes, hashes: Sequence[bytes], *, portable: bool = False) -> list[BlockHash]: ...
def accelerated() -> bool: ...
