"""Batches of pages: whatever the pieces they come in, what was sent arrives, and only what arrived counts."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.service.protocol import batches
from kvstore.service.protocol.batches import Incoming
from kvstore.service.protocol.frames import ProtocolError

LEASE = 7


class Slots:
    """A session with one save lease of pages of those sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.pages = [bytearray(size) for size in sizes]
        self.have: set[int] = set()
        self.is_open = True

    def writable(self, lease_id: int, index: int, num_bytes: int) -> memoryview | None:
        if lease_id != LEASE or not self.is_open:
            return None
        if index >= len(self.pages) or num_bytes != len(self.pages[index]):
            raise ProtocolError("no such page")
        return memoryview(self.pages[index])

    def written(self, lease_id: int, index: int) -> None:
        assert lease_id == LEASE
        self.have.add(index)


def split(pages: list[bytes], lease_id: int = LEASE) -> tuple[bytes, bytes, bytes]:
    """A batch of pages 0, 1, ...: its head, its pages, its checksums."""
    head, *rest = batches.parts(lease_id, range(len(pages)), [memoryview(page) for page in pages])
    return bytes(head), b"".join(rest[:-1]), bytes(rest[-1])


def body_bytes(pages: list[bytes]) -> int:
    return batches.body_bytes([len(page) for page in pages])


def receive(batch: Incoming, data: bytes, pieces: list[int]) -> None:
    """As a socket does: a piece at a time into the room there is; where the pieces end, all of the rest."""
    while not batch.is_full:
        room = batch.room()
        num_bytes = min(len(room), pieces.pop(0) if pieces else len(room))
        room[:num_bytes] = data[:num_bytes]
        data = data[num_bytes:]
        batch.advance(num_bytes)
    assert not data


PAGES = st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=8)


@given(PAGES, st.integers(0, 200), st.lists(st.integers(1, 20), max_size=20))
def test_what_is_sent_arrives_in_any_pieces(pages: list[bytes], early: int, pieces: list[int]) -> None:
    slots = Slots([len(page) for page in pages])
    head, data, checksums = split(pages)
    assert len(head + data + checksums) == body_bytes(pages)

    batch = Incoming(slots, head, body_bytes(pages))
    taken = batch.take(memoryview(data + checksums)[:early])
    receive(batch, data[taken:], pieces)
    assert batch.num_coming == batch.tail_bytes == len(checksums)
    assert not slots.have
    batch.end(checksums)

    assert taken == min(early, len(data))
    assert [bytes(page) for page in slots.pages] == pages
    assert slots.have == set(range(len(pages)))


@given(PAGES, st.data())
def test_a_page_with_a_flipped_bit_does_not_count(pages: list[bytes], data: st.DataObject) -> None:
    slots = Slots([len(page) for page in pages])
    head, sent, checksums = split(pages)
    at = data.draw(st.integers(0, len(sent) - 1))
    wrong = next(index for index in range(len(pages)) if at < sum(map(len, pages[: index + 1])))

    batch = Incoming(slots, head, body_bytes(pages))
    batch.take(memoryview(sent[:at] + bytes([sent[at] ^ 4]) + sent[at + 1 :]))
    batch.end(checksums)

    assert slots.have == set(range(len(pages))) - {wrong}


def test_pages_of_a_lease_that_ends_meanwhile_go_nowhere() -> None:
    slots = Slots([4, 4, 4])
    head, data, checksums = split([b"aaaa", b"bbbb", b"cccc"])
    batch = Incoming(slots, head, body_bytes([b"aaaa"] * 3))
    batch.take(memoryview(data)[:6])

    slots.is_open = False
    receive(batch, data[6:], [])
    batch.end(checksums)

    assert slots.have == {0}
    assert slots.pages == [b"aaaa", b"bb\0\0", b"\0\0\0\0"]


def test_pages_of_a_lease_that_is_not_known_are_received_all_the_same() -> None:
    slots = Slots([4])
    head, data, checksums = split([b"aaaa", b"b" * 100_000], lease_id=9)
    batch = Incoming(slots, head, 4 + 100_000 + batches.body_bytes([0, 0]))

    receive(batch, data, [])
    batch.end(checksums)

    assert not slots.have
    assert slots.pages == [b"\0\0\0\0"]


def test_what_leaves_a_lease_that_has_ended_has_no_checksum() -> None:
    held = iter([True, False])

    *_, checksums = batches.parts(LEASE, [0, 1], [memoryview(b"aaaa"), memoryview(b"bbbb")], lambda: next(held))

    assert batches.decode_checksums(bytes(checksums)) == (batches.checksum(memoryview(b"aaaa")), 0)


@pytest.mark.parametrize(
    ("head", "num_bytes", "told"),
    [
        (struct.pack("<QI", LEASE, 0), 12, "a batch of 0 pages"),
        (struct.pack("<QI", LEASE, 1 << 31), 12, "a batch of 2147483648 pages"),
        (struct.pack("<QIII", LEASE, 1, 0, 4), 33, "a batch of 33 bytes announces 32"),
        (struct.pack("<QIII", LEASE, 1, 0, 0), 28, "page 0 is sent with no bytes"),
        (struct.pack("<QIII", LEASE, 1, 9, 4), 32, "no such page"),
    ],
)
def test_a_head_that_is_none_is_refused(head: bytes, num_bytes: int, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        Incoming(Slots([4]), head, num_bytes)


@given(st.lists(st.integers(1, batches.MAX_BYTES + 1), max_size=40))
def test_batches_are_bounded_and_miss_no_page(sizes: list[int]) -> None:
    cuts = list(batches.cut(sizes))

    assert [size for cut in cuts for size in sizes[cut]] == sizes
    assert all(sum(sizes[cut]) <= batches.MAX_BYTES or len(sizes[cut]) == 1 for cut in cuts)


def test_a_batch_has_no_more_pages_than_are_allowed() -> None:
    assert list(batches.cut([1] * 1500)) == [slice(0, batches.MAX_PAGES), slice(batches.MAX_PAGES, 1500)]
