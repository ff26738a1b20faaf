from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from radix import hashing
from radix.hashing import BlockHash, BlockHasher, Namespace, bind_hashes, hash_blocks

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"
ROOT = Namespace("example/model", "r1", "float32", "layout", 4).root()

ids = st.integers(0, 2**32 - 1)
algorithms = st.sampled_from(hashing.HASHES)


def published() -> dict[str, Any]:
    """The test vectors as they stand in the documentation."""
    (block,) = re.findall(r"```json\n(.*?)```", FORMATS.read_text("utf-8").split("### Test vectors")[1], re.DOTALL)[:1]
    vectors: dict[str, Any] = json.loads(block)
    return vectors


@pytest.fixture(params=["c", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to hash: the C extension and its twin."""
    if request.param == "python":
        monkeypatch.setattr(hashing, "_chain", None)
    elif hashing._chain is None:
        pytest.skip("radix._chain is not built: python setup.py build_ext --inplace")
    return str(request.param)


@pytest.mark.parametrize("vector", published()["chains"], ids=lambda vector: vector["name"])
def test_published_chain_is_what_we_compute(vector: dict[str, Any], way: str) -> None:
    fields = vector["namespace"] | {"extra": tuple(map(tuple, vector["namespace"]["extra"]))}
    namespace = Namespace(**fields)

    keys = hash_blocks(vector["tokens"], namespace.block_size, root=namespace.root(), algorithm=namespace.hash)

    assert namespace.root().hex() == vector["root"]
    assert [key.hex() for key in keys] == vector["keys"]


def test_published_bound_hashes_are_what_we_compute(way: str) -> None:
    vector = published()["bound"]

    keys = bind_hashes(BlockHash(bytes.fromhex(vector["root"])), [bytes.fromhex(h) for h in vector["engine_hashes"]])

    assert [key.hex() for key in keys] == vector["keys"]


@given(st.lists(ids, max_size=70), st.integers(1, 20))
def test_chain_is_sha256_of_the_key_before_and_the_block(tokens: list[int], block_size: int) -> None:
    expected = []
    key: bytes = ROOT
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + block_size])
        key = hashlib.sha256(key + block).digest()
        expected.append(key)

    assert hash_blocks(tokens, block_size, root=ROOT) == expected


def test_xxh3_chain_is_xxh3_of_the_key_before_and_the_block() -> None:
    tokens = np.arange(8, dtype="<u4")

    keys = hash_blocks(tokens, 4, root=ROOT, algorithm="xxh3_128")

    first = xxhash.xxh3_128_digest(ROOT + tokens[:4].tobytes())
    assert keys == [first, xxhash.xxh3_128_digest(first + tokens[4:].tobytes())]
    assert len(first) == 16


@given(st.lists(ids, max_size=60), st.integers(1, 9), algorithms, st.data())
def test_a_prompt_hashed_in_pieces_has_the_keys_of_the_whole(
    tokens: list[int], block_size: int, algorithm: str, data: st.DataObject
) -> None:
    hasher = BlockHasher(ROOT, block_size, algorithm, keep_tokens=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))

    new = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        new += hasher.extend(np.array(tokens[start:stop], dtype=np.int64))

    full = len(tokens) // block_size * block_size
    assert new == hasher.keys == hash_blocks(tokens, block_size, root=ROOT, algorithm=algorithm)
    assert hasher.num_tokens == len(tokens)
    assert bytes(hasher.token_bytes or b"") == np.array(tokens[:full], dtype="<u4").tobytes()


def test_a_tail_shorter_than_a_block_has_no_key() -> None:
    assert len(hash_blocks(range(11), 4, root=ROOT)) == 2
    assert hash_blocks(range(3), 4, root=ROOT) == []
    assert hash_blocks([], 4, root=ROOT) == []


def test_a_key_names_all_tokens_before_it() -> None:
    one = hash_blocks([1, 2, 3, 4, 5, 6, 7, 8], 4, root=ROOT)
    other = hash_blocks([0, 2, 3, 4, 5, 6, 7, 8], 4, root=ROOT)

    assert set(one).isdisjoint(other)


def test_other_root_gives_other_keys() -> None:
    other = Namespace("example/model", "r1", "float32", "layout", 4, salt="tenant").root()

    assert set(hash_blocks(range(8), 4, root=ROOT)).isdisjoint(hash_blocks(range(8), 4, root=other))


@given(st.lists(ids, min_size=8, max_size=8), algorithms)
def test_a_chain_goes_on_from_the_key_before(tokens: list[int], algorithm: str) -> None:
    whole = hash_blocks(tokens, 4, root=ROOT, algorithm=algorithm)

    assert hash_blocks(tokens[4:], 4, root=whole[0], algorithm=algorithm) == whole[1:]


def test_hasher_keeps_nothing_of_the_arrays_it_was_given() -> None:
    hasher = BlockHasher(ROOT, 4)
    tokens = np.arange(6, dtype=np.uint32)

    hasher.extend(tokens)
    tokens[:] = 99
    hasher.extend([6, 7])

    assert hasher.keys == hash_blocks(range(8), 4, root=ROOT)


def test_hasher_keeps_no_tokens_unless_asked() -> None:
    hasher = BlockHasher(ROOT, 4)
    hasher.extend(range(8))

    assert hasher.token_bytes is None


def test_a_pickled_hasher_goes_on_where_it_was() -> None:
    hasher = BlockHasher(ROOT, 4, keep_tokens=True)
    hasher.extend(range(6))

    copy = pickle.loads(pickle.dumps(hasher))
    copy.extend([6, 7])

    assert copy.keys == hash_blocks(range(8), 4, root=ROOT)
    assert len(hasher.keys) == 1


def test_refused_tokens_leave_the_hasher_as_it_was() -> None:
    hasher = BlockHasher(ROOT, 4)
    hasher.extend(range(6))

    with pytest.raises(ValueError, match="tokens"):
        hasher.extend([-1])

    assert hasher.num_tokens == 6
    assert hasher.extend([6, 7]) == hash_blocks(range(8), 4, root=ROOT)[1:]


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_bound_hash_is_sha256_of_root_and_hash(hashes: list[bytes]) -> None:
    assert bind_hashes(ROOT, hashes) == [hashlib.sha256(ROOT + h).digest() for h in hashes]
    assert bind_hashes(ROOT, tuple(hashes)) == bind_hashes(ROOT, hashes)


@pytest.mark.parametrize("block_size", [0, -1, 2**32])
def test_block_size_out_of_range_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size is {block_size}; it must be at least 1 token"):
        hash_blocks([1], block_size, root=ROOT)


def test_unknown_algorithm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="algorithm is 'sha1'; it must be one of sha256, xxh3_128"):
        BlockHasher(ROOT, 4, "sha1")


def test_root_of_the_wrong_length_is_refused(way: str) -> None:
    short = BlockHash(b"root")

    with pytest.raises(ValueError, match="root is 4 bytes; it must be 32"):
        hash_blocks(range(4), 4, root=short)
    with pytest.raises(ValueError, match="root is 4 bytes; it must be 32"):
        bind_hashes(short, [])
    with pytest.raises(ValueError, match="root is 4 bytes; it must be 32"):
        BlockHasher(short, 4)


def test_an_engine_hash_that_is_not_bytes_is_refused(way: str) -> None:
    with pytest.raises(TypeError, match=r"hashes\[1\] is int; it must be bytes"):
        bind_hashes(ROOT, [b"a", 5])  # type: ignore[list-item]


@pytest.mark.parametrize("portable", [False, True], ids=["fastest", "portable"])
class TestChainInC:
    """The extension against hashlib, past `hash_blocks`."""

    @pytest.fixture
    def chain(self) -> ModuleType:
        module: ModuleType = pytest.importorskip("radix._chain", reason="radix._chain is not built")
        return module

    @given(root=st.binary(min_size=32, max_size=32), block_bytes=st.integers(1, 300), data=st.data())
    def test_chain_equals_its_twin(self, portable: bool, root: bytes, block_bytes: int, data: st.DataObject) -> None:
        chain = pytest.importorskip("radix._chain", reason="radix._chain is not built")
        num_blocks = data.draw(st.integers(0, 5))
        blocks = data.draw(st.binary(min_size=block_bytes * num_blocks, max_size=block_bytes * num_blocks))

        keys = chain.chain_sha256(root, blocks, block_bytes, portable=portable)

        assert keys == hashing.chain_twin(BlockHash(root), memoryview(blocks), block_bytes)

    @given(root=st.binary(min_size=32, max_size=32), hashes=st.lists(st.binary(max_size=300), max_size=5))
    def test_bind_equals_its_twin(self, portable: bool, root: bytes, hashes: list[bytes]) -> None:
        chain = pytest.importorskip("radix._chain", reason="radix._chain is not built")

        assert chain.bind_sha256(root, hashes, portable=portable) == hashing.bind_twin(BlockHash(root), hashes)

    def test_every_length_of_padding_is_right(self, chain: ModuleType, portable: bool) -> None:
        data = bytes(range(256)) * 2

        for num_bytes in range(1, 300):
            (key,) = chain.chain_sha256(ROOT, data[:num_bytes], num_bytes, portable=portable)
            assert key == hashlib.sha256(ROOT + data[:num_bytes]).digest()

    def test_many_blocks_without_the_gil_equal_their_twin(self, chain: ModuleType, portable: bool) -> None:
        blocks = np.random.default_rng(0).bytes(64 * 1000)
        hashes = [blocks[i : i + 32] for i in range(0, len(blocks), 32)]

        assert chain.chain_sha256(ROOT, blocks, 64, portable=portable) == hashing.chain_twin(
            ROOT, memoryview(blocks), 64
        )
        assert chain.bind_sha256(ROOT, hashes, portable=portable) == hashing.bind_twin(ROOT, hashes)

    def test_wrong_arguments_are_refused(self, chain: ModuleType, portable: bool) -> None:
        with pytest.raises(ValueError, match=r"multiple of block_bytes \(64\)"):
            chain.chain_sha256(ROOT, b"x" * 65, 64, portable=portable)
        with pytest.raises(ValueError, match="multiple of block_bytes"):
            chain.chain_sha256(ROOT, b"", 0, portable=portable)
        with pytest.raises(ValueError, match="root is 0 bytes"):
            chain.chain_sha256(b"", b"", 64, portable=portable)
        with pytest.raises((BufferError, TypeError, ValueError), match="contiguous"):
            chain.chain_sha256(ROOT, np.zeros(64, np.uint32)[::2].data, 64, portable=portable)
        with pytest.raises(TypeError):
            chain.bind_sha256(ROOT, 5, portable=portable)
