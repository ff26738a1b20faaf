"""Slot files of llama-server: the state of one sequence, as `POST /slots/ID?action=save` writes it.

    magic, version, number of ints | ints: the tokens, in newer versions with a head and a tail around them
    per cache (one; two where some layers have a sliding window):
        number of streams; per stream its number of cells, and for each cell: position, 1, sequence id
        V transposed?, number of layers, in version 4 two more words (sizes of a rotation of K and V)
        per layer: type of K, bytes of a row, one row for each cell
        per layer: the same of V; transposed: type, bytes of an element, width, and for each column one element per cell

A row belongs to one token, so a file can be cut at any token, and one can be put together of pieces. That is so for
full attention only: a window's cache has lost the rows of the first tokens, and what a recurrent layer keeps has none.

The hard thing: the format has no description, and changes with its version. A file is read in each way that is known,
and only a reading that accounts for every byte counts; anything else is refused (UnsliceableState).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.errors import KVStoreError

Bytes = npt.NDArray[np.uint8]

MAGIC = 0x67677371  # "ggsq"
TOKENS_HEAD = -1  # before tokens that are written with head and tail
EXTRA_WORDS = (2, 0, 1)  # of a cache's head, in the order in which they are tried
CELL_WORDS = 3
MAX_LAYERS = 4096
MAX_ROW_BYTES = 1 << 24
MAX_TYPE = 255
# Of ggml, those that caches are made of; others are called by their number.
TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}


class UnsliceableState(KVStoreError):
    """A slot file that cannot be cut by tokens: of another model or format than those known, or cut short."""


@dataclass(frozen=True, slots=True)
class Rows:
    """K or V of one layer. unit_bytes: of a row; transposed, of an element, of which a row has `width`."""

    type: int
    unit_bytes: int
    width: int = 1
    transposed: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.unit_bytes * self.width

    @property
    def head(self) -> bytes:
        """The bytes before the rows."""
        if self.transposed:
            return struct.pack("<iII", self.type, self.unit_bytes, self.width)
        return struct.pack("<iQ", self.type, self.unit_bytes)

    @property
    def name(self) -> str:
        """As it is called in a layout's format."""
        name = TYPES.get(self.type, f"type{self.type}")
        return f"{name}x{self.unit_bytes}" + (f"x{self.width}t" if self.transposed else "")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One cache of a context: its streams, the words of its head, and K, then V of its layers."""

    num_streams: int
    words: tuple[int, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True, slots=True)
class StateShape:
    """Everything of a slot file but its tokens and rows. Equal shapes of equal models mean the same.

    framed: the tokens have a head and a tail.
    """

    version: int
    framed: bool
    caches: tuple[CacheShape, ...]

    @property
    def rows(self) -> tuple[Rows, ...]:
        """K and V of all layers, in the order of the file."""
        return tuple(rows for cache in self.caches for rows in cache.rows)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return sum(rows.token_bytes for rows in self.rows)

    @property
    def format(self) -> str:
        """The order of the bytes of a page, for a layout. The number of streams is the server's, not the page's."""
        caches = []
        for cache in self.caches:
            runs = [f"{name}*{len(list(run))}" for name, run in groupby(rows.name for rows in cache.rows)]
            caches.append(f"{'.'.join(map(str, cache.words))}:{','.join(runs)}")
        return f"llamacpp:v{self.version};" + ";".join(caches)

    @property
    def dtype(self) -> str:
        """The element types."""
        return "+".join(sorted({TYPES.get(rows.type, f"type{rows.type}") for rows in self.rows}))


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A slot file that was read.

    tokens: int32, shape (T,).
    places: per `shape.rows` the offset of its first byte.
    orders: per cache the cell of each token, shape (T,); and per cache its number of cells.
    """

    data: Bytes
    shape: StateShape
    tokens: npt.NDArray[np.int32]
    places: tuple[int, ...]
    orders: tuple[npt.NDArray[np.int64], ...]
    num_cells: tuple[int, ...]

    def copy_out(self, first: int, num_tokens: int, page: Bytes) -> None:
        """Write the rows of `num_tokens` tokens from `first` on into `page`, one K or V after another."""
        index, at = 0, 0
        for cache, order, cells in zip(self.shape.caches, self.orders, self.num_cells, strict=True):
            chosen: Any = order[first : first + num_tokens]
            if chosen[-1] - chosen[0] == num_tokens - 1 and (np.diff(chosen) == 1).all():
                chosen = slice(int(chosen[0]), int(chosen[-1]) + 1)  # as nearly always: a view, no copy
            for rows in cache.rows:
                num_bytes = rows.token_bytes * num_tokens
                source = _grid(self.data, self.places[index], rows, cells)
                target = _grid(page, at, rows, num_tokens)
                np.copyto(target, source[:, chosen] if rows.transposed else source[chosen])
                index, at = index + 1, at + num_bytes


def read(data: Bytes) -> SlotFile:
    """Read a slot file. Raises UnsliceableState, which says what is wrong with it."""
    if len(data) < 12:
        raise UnsliceableState(f"the slot file has {len(data)} bytes: it was cut short")
    magic, version, count = _unpack("<III", data)
    if magic != MAGIC:
        raise UnsliceableState(
            f"the slot file begins with {magic:#x}, not with {MAGIC:#x}: it is no state of a sequence"
        )
    if 12 + 4 * count > len(data):
        raise UnsliceableState(f"the slot file has {len(data)} bytes, too few for its {count} tokens: it was cut short")
    tokens, framed = _tokens(data[12 : 12 + 4 * count].view("<i4") if count else np.empty(0, np.int32))
    for words in EXTRA_WORDS:
        for has_values in (True, False):
            found = _caches(data, 12 + 4 * count, words, has_values)
            if found is not None:
                return _checked(data, version, framed, tokens, found)
    raise UnsliceableState(
        f"a slot file of version {version} with {len(data)} bytes cannot be cut into tokens: it was cut short, or the "
        "model is no plain attention model (sliding window, recurrent, hybrid, M-RoPE), or this build writes another "
        "format"
    )


def prefix_head(shape: StateShape, tokens: npt.NDArray[np.int32]) -> list[bytes | Rows]:
    """The pieces of a file of these tokens, in order: bytes as they are, and places of rows."""
    count = len(tokens)
    ints = tokens.astype("<i4").tobytes()
    if shape.framed:
        ints = struct.pack("<iii", TOKENS_HEAD, 1, count) + ints + struct.pack("<i", 0)
    pieces: list[bytes | Rows] = [struct.pack("<III", MAGIC, shape.version, len(ints) // 4) + ints]
    cells = np.empty((count, CELL_WORDS), "<u4")
    cells[:] = (0, 1, 0)
    cells[:, 0] = np.arange(count)
    for cache in shape.caches:
        # The stream that a sequence goes to is the server's affair: any one may have the cells.
        pieces.append(struct.pack("<II", cache.num_streams, count) + cells.tobytes())
        pieces.append(struct.pack(f"<{len(cache.words)}I", *cache.words))
        for rows in cache.rows:
            pieces += [rows.head, rows]
        pieces.append(bytes(4 * (cache.num_streams - 1)))
    return pieces


def copy_in(
    page: Bytes, shape: StateShape, data: Bytes, places: tuple[int, ...], first: int, total: int, size: int
) -> None:
    """Write the rows of a page of `size` tokens at token `first` into a file of `total` tokens, rows at `places`."""
    at = 0
    for rows, place in zip(shape.rows, places, strict=True):
        source, target = _grid(page, at, rows, size), _grid(data, place, rows, total)
        np.copyto(target[:, first : first + size] if rows.transposed else target[first : first + size], source)
        at += rows.token_bytes * size


# ---- private --------------------------------------------------------------------------------------------------------


def _grid(data: Bytes, at: int, rows: Rows, count: int) -> npt.NDArray[Any]:
    """Rows of `count` tokens: shape (count, bytes), or transposed (width, count) of elements."""
    flat = data[at : at + rows.token_bytes * count]
    if not rows.transposed:
        return flat.reshape(count, rows.token_bytes)
    kind = "u" if rows.unit_bytes in (1, 2, 4, 8) else "V"
    return flat.view(f"{kind}{rows.unit_bytes}").reshape(rows.width, count)


def _tokens(ints: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], bool]:
    if len(ints) == 0 or ints[0] != TOKENS_HEAD:
        return ints.astype(np.int32), False
    if len(ints) < 4 or ints[1] != 1 or len(ints) != int(ints[2]) + 4 or ints[-1] != 0:
        raise UnsliceableState(
            "the slot file's tokens have images or sound among them, or are written in an unknown way"
        )
    return ints[3:-1].astype(np.int32), True


@dataclass(frozen=True, slots=True)
class _Cache:
    shape: CacheShape
    positions: npt.NDArray[np.uint32]
    places: tuple[int, ...]


def _caches(data: Bytes, at: int, num_words: int, has_values: bool) -> list[_Cache] | None:
    """All caches of a file, read in one way; None if a byte is left, missing or strange."""
    found: list[_Cache] = []
    try:
        while at < len(data):
            cache, at = _cache(data, at, num_words, has_values)
            found.append(cache)
    except (struct.error, _Strange):
        return None
    return found


class _Strange(Exception):
    pass


def _unpack(form: str, data: Bytes, at: int = 0) -> tuple[int, ...]:
    return struct.unpack_from(form, data.data, at)


def _cache(data: Bytes, at: int, num_words: int, has_values: bool) -> tuple[_Cache, int]:
    (num_streams,) = _unpack("<I", data, at)
    at += 4
    _expect(1 <= num_streams <= 1024)
    positions, shape = np.empty(0, np.uint32), None
    places: tuple[int, ...] = ()
    for _ in range(num_streams):
        (count,) = _unpack("<I", data, at)
        at += 4
        if count == 0:
            continue
        _expect(shape is None and at + 12 * count <= len(data))  # a sequence is in one stream
        cells = data[at : at + 12 * count].view("<u4").reshape(count, CELL_WORDS)
        _expect(bool((cells[:, 1] == 1).all()))
        positions, at = cells[:, 0], at + 12 * count
        shape, places, at = _rows(data, at, count, num_streams, num_words, has_values)
    _expect(shape is not None)
    assert shape is not None
    return _Cache(shape, positions, places), at


def _rows(
    data: Bytes, at: int, count: int, num_streams: int, num_words: int, has_values: bool
) -> tuple[CacheShape, tuple[int, ...], int]:
    words = _unpack(f"<{2 + num_words}I", data, at)
    at += 4 * len(words)
    transposed, num_layers = words[0], words[1]
    _expect(transposed <= 1 and 1 <= num_layers <= MAX_LAYERS)
    rows, places = [], []
    for is_transposed in [False] * num_layers + [bool(transposed)] * (num_layers if has_values else 0):
        if is_transposed:
            kind, unit_bytes, width = _unpack("<iII", data, at)
            one = Rows(kind, unit_bytes, width, True)
        else:
            kind, unit_bytes = _unpack("<iQ", data, at)
            one = Rows(kind, unit_bytes)
        at += 12
        _expect(0 <= one.type <= MAX_TYPE and 0 < one.token_bytes <= MAX_ROW_BYTES)
        rows.append(one)
        places.append(at)
        at += one.token_bytes * count
        _expect(at <= len(data))
    return CacheShape(num_streams, tuple(words), tuple(rows)), tuple(places), at


def _expect(holds: bool) -> None:
    if not holds:
        raise _Strange


def _checked(data: Bytes, version: int, framed: bool, tokens: npt.NDArray[np.int32], caches: list[_Cache]) -> SlotFile:
    orders = []
    for cache in caches:
        order = np.argsort(cache.positions, kind="stable")
        if len(order) < len(tokens) or not np.array_equal(
            cache.positions[order][: len(tokens)], np.arange(len(tokens))
        ):
            raise UnsliceableState(
                f"the slot has {len(tokens)} tokens, and its cache not the rows of each of them ({len(order)} cells): "
                "a sliding window has dropped the first ones (some builds save them all with --swa-full, that of "
                "2026-10 does not), or the context was shifted (start llama-server without --context-shift)"
            )
        orders.append(order[: len(tokens)])
    if not caches:
        raise UnsliceableState("the slot file has tokens and no cache")
    shape = StateShape(version, framed, tuple(cache.shape for cache in caches))
    places = tuple(place for cache in caches for place in cache.places)
    return SlotFile(data, shape, tokens, places, tuple(orders), tuple(len(cache.positions) for cache in caches))


def row_places(pieces: list[bytes | Rows], num_tokens: int) -> Iterator[tuple[int, bytes | Rows]]:
    """Each piece with its offset in a file of `num_tokens` tokens."""
    at = 0
    for piece in pieces:
        yield at, piece
        at += piece.token_bytes * num_tokens if isinstance(piece, Rows) else len(piece)
