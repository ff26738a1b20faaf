from __future__ import annotations

import struct

import numpy as np
import pytest

from connectors.llamacpp.slotfile import Bytes, Rows, UnsliceableState, copy_in, prefix_head, read, row_places
from tests.helpers.llama_server import LAYERS, ROW, rows_of, slot_file

TOKENS = [7, 1, 9, 4, 4, 2, 8, 3]


def as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def rebuilt(data: bytes, num_tokens: int, size: int) -> bytes:
    """The file of the first tokens, put together of pages of `size` tokens."""
    state = read(as_bytes(data))
    pieces = prefix_head(state.shape, state.tokens[:num_tokens])
    placed = list(row_places(pieces, num_tokens))
    total = placed[-1][0] + len(placed[-1][1]) if isinstance(placed[-1][1], bytes) else 0
    out = np.zeros(total, np.uint8)
    for at, piece in placed:
        if isinstance(piece, bytes):
            out[at : at + len(piece)] = as_bytes(piece)
    places = tuple(at for at, piece in placed if isinstance(piece, Rows))
    for first in range(0, num_tokens, size):
        page = np.zeros(state.shape.token_bytes * size, np.uint8)
        state.copy_out(first, size, page)
        copy_in(page, state.shape, out, places, first, num_tokens, size)
    return out.tobytes()


def transposed_file(tokens: list[int], width: int = 6) -> bytes:
    """A file of one layer whose V is written column by column, elements of two bytes."""
    count = len(tokens)
    values = np.array([[token * 100 + column for token in tokens] for column in range(width)], "<u2")
    return b"".join(
        (
            struct.pack("<III", 0x67677371, 2, count) + struct.pack(f"<{count}i", *tokens),
            struct.pack("<II", 1, count) + b"".join(struct.pack("<III", i, 1, 0) for i in range(count)),
            struct.pack("<II", 1, 1),
            struct.pack("<iQ", 1, ROW) + rows_of(tokens, 0, "k"),
            struct.pack("<iII", 1, 2, width) + values.tobytes(),
        )
    )


class TestRead:
    @pytest.mark.parametrize("version", [2, 4])
    def test_tokens_and_rows_are_those_of_the_file(self, version: int) -> None:
        state = read(as_bytes(slot_file(TOKENS, version=version)))

        assert state.tokens.tolist() == TOKENS
        assert state.shape.token_bytes == 2 * LAYERS * ROW
        page = np.zeros(state.shape.token_bytes * 2, np.uint8)
        state.copy_out(4, 2, page)
        assert page[: 2 * ROW].tobytes() == rows_of(TOKENS, 0, "k")[4 * ROW : 6 * ROW]

    def test_cells_in_another_order_are_read_by_position(self) -> None:
        mixed = read(as_bytes(slot_file(TOKENS, cells=[5, 6, 7, 0, 2, 1, 4, 3])))
        plain = read(as_bytes(slot_file(TOKENS)))

        pages = [np.zeros(plain.shape.token_bytes * 4, np.uint8) for _ in range(2)]
        for state, page in zip((mixed, plain), pages, strict=True):
            state.copy_out(2, 4, page)
        assert np.array_equal(*pages)

    @pytest.mark.parametrize("cut", [1, 4, 100, 500])
    def test_a_file_cut_short_is_refused(self, cut: int) -> None:
        with pytest.raises(UnsliceableState, match="cut short"):
            read(as_bytes(slot_file(TOKENS)[:-cut]))

    def test_a_file_of_something_else_is_refused(self) -> None:
        with pytest.raises(UnsliceableState, match="no state of a sequence"):
            read(as_bytes(b"GGUF" + bytes(100)))
        with pytest.raises(UnsliceableState, match="cut short"):
            read(as_bytes(b"qsg"))

    def test_a_window_that_has_dropped_tokens_is_refused_with_what_to_do(self) -> None:
        with pytest.raises(UnsliceableState, match="--swa-full"):
            read(as_bytes(slot_file(TOKENS, cells=[4, 5, 6, 7])))

    def test_tokens_with_images_are_refused(self) -> None:
        data = bytearray(slot_file(TOKENS))
        struct.pack_into("<i", data, 12 + 4 * (3 + len(TOKENS)), 1)  # one image

        with pytest.raises(UnsliceableState, match="images"):
            read(as_bytes(bytes(data)))

    def test_a_number_of_tokens_beyond_all_bounds_is_refused(self) -> None:
        data = bytearray(slot_file(TOKENS))
        struct.pack_into("<i", data, 12 + 4 * 2, (1 << 31) - 1)

        with pytest.raises(UnsliceableState):
            read(as_bytes(bytes(data)))

    def test_a_byte_left_over_is_refused(self) -> None:
        with pytest.raises(UnsliceableState):
            read(as_bytes(slot_file(TOKENS) + b"\0"))


class TestPrefix:
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_a_file_of_pages_is_the_file_of_fewer_tokens(self, size: int) -> None:
        assert rebuilt(slot_file(TOKENS), 4, size) == slot_file(TOKENS[:4])

    def test_values_written_by_columns_are_cut_by_tokens(self) -> None:
        data = transposed_file(TOKENS)

        assert read(as_bytes(data)).shape.rows[1] == Rows(1, 2, 6, True)
        assert rebuilt(data, 4, 2) == transposed_file(TOKENS[:4])

    def test_formats_name_types_sizes_and_order(self) -> None:
        formats = {
            read(as_bytes(data)).shape.format
            for data in (slot_file(TOKENS), slot_file(TOKENS, version=2), transposed_file(TOKENS))
        }

        assert len(formats) == 3
        assert read(as_bytes(slot_file(TOKENS, streams=5))).shape.format in formats  # which is the server's affair
