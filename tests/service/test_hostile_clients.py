"""Clients that do what no client library does: only their own connection ends, and the others notice nothing."""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvstore.errors import RequestError
from kvstore.service.client import calls
from kvstore.service.daemon import clients, patience
from kvstore.service.protocol import frames, messages
from kvstore.service.protocol.frames import HEADER, Kind, ReplyStatus, encode_frame, encode_json
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import LocalDaemon, attach, local_daemon, wait_until
from tests.helpers.stores import BLOCK, LAYOUT, load, namespace, prompt, save

FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3
STATS = encode_frame(Kind.CALL, messages.encode(messages.StatsCall()))
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(path) as daemon:
        yield daemon
        for opened in daemon.daemon.stores.all():
            opened.store.check()


class Raw:
    """A client of the socket itself."""

    def __init__(self, path: Path, *, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.fd, self.others = -1, list[int]()
        if hello:
            names = {"layout": layout_to_json(LAYOUT), "namespace": namespace_to_json(namespace()), "client": "hostile"}
            self.socket.sendall(encode_frame(Kind.HELLO, encode_json(names)))
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 4)
            self.fd, self.others = fds[0], fds[1:]
            self.greeting = json.loads(data[HEADER.size :])

    def answer(self) -> tuple[ReplyStatus, bytes]:
        """The next frame; ConnectionError at the end."""
        head = self._exactly(HEADER.size)
        frame = frames.decode_header(head)
        return frame.status, self._exactly(frame.num_bytes)

    def close(self) -> None:
        self.socket.close()
        for fd in [*([self.fd] if self.fd >= 0 else []), *self.others]:
            os.close(fd)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            piece = self.socket.recv(num_bytes - len(data))
            if not piece:
                raise ConnectionError("hung up")
            data += piece
        return data


def all_is_well(path: Path) -> None:
    """A client of the library finds everything in order."""
    with attach(path, client="good") as store:
        assert save(store, store.request(prompt(8, seed=99))) in (0, 8)
        assert load(store, store.request(prompt(8, seed=99)))[0] == 8
        assert store.num_attached == 1


def punch_hole(fd: int) -> None:
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(1 << 20)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


MISCHIEF: dict[str, Callable[[int], object]] = {
    "truncate": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 1 << 40),
    "punch holes": punch_hole,
    "seal": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    "flags": lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK),
    "seek": lambda fd: os.lseek(fd, 1 << 30, os.SEEK_SET),
    "lock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "record lock": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "lease": lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK),
    "mode": lambda fd: os.fchmod(fd, 0),
    "mode for all": lambda fd: os.fchmod(fd, 0o777),
    "close": lambda fd: os.close(os.dup(fd)),
}


@pytest.mark.parametrize("name", MISCHIEF)
def test_nothing_done_to_the_descriptor_of_the_slab_hurts_others(daemon: LocalDaemon, path: Path, name: str) -> None:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # told to the holder of a lease who should give it back
    try:
        with Raw(path) as raw:
            with suppress(PermissionError, BlockingIOError):  # by the kernel
                MISCHIEF[name](raw.fd)

            all_is_well(path)
    finally:
        signal.signal(signal.SIGIO, before)


def test_descriptors_that_a_client_sends_are_not_kept(daemon: LocalDaemon, path: Path) -> None:
    all_is_well(path)
    before = len(os.listdir("/proc/self/fd"))
    with Raw(path) as raw:
        read, write = os.pipe()
        junk = array.array("i", [read, write] * 50)
        frame = STATS
        for _ in range(20):
            raw.socket.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, junk)])
            assert raw.answer()[0] is ReplyStatus.OK
        os.close(read)
        os.close(write)

        assert len(os.listdir("/proc/self/fd")) <= before + 5  # the sockets and the slab of this client

    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_frame_that_is_too_large_is_told_and_ends_its_connection_alone(daemon: LocalDaemon, path: Path) -> None:
    with attach(path, client="neighbour") as store:
        lease = store.prepare_save(store.request(prompt(3)), 0, 3)
        with Raw(path) as raw:
            raw.socket.sendall(HEADER.pack(frames.MAGIC, frames.VERSION, Kind.CALL, 0, (8 << 20) + 1, 1))
            status, told = raw.answer()
            assert (status, b"more than is allowed" in told) == (ReplyStatus.ERROR, True)
            with pytest.raises(ConnectionError):
                raw.answer()
        store.complete(lease)
        assert store.num_attached == 1
        assert store.lookup(store.request(prompt(3))).num_blocks == 3


def test_a_header_costs_no_memory_for_what_it_announces(daemon: LocalDaemon, path: Path) -> None:
    with Raw(path) as raw:
        raw.socket.sendall(HEADER.pack(frames.MAGIC, frames.VERSION, Kind.CALL, 0, 8 << 20, 1) + bytes(1000))
        wait_until(lambda: daemon.look(lambda inside: max(c._end for c in inside.clients._channels)) == 1016)

        assert daemon.look(lambda inside: max(len(c._buffer) for c in inside.clients._channels)) == 64 << 10


def test_what_messages_that_are_not_whole_may_hold_is_bounded(
    daemon: LocalDaemon, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MAX_HELD_BYTES", 3 << 20)
    half = HEADER.pack(frames.MAGIC, frames.VERSION, Kind.CALL, 0, 8 << 20, 1) + bytes(1 << 20)
    held = [Raw(path) for _ in range(4)]

    for raw in held:
        with suppress(OSError):
            raw.socket.sendall(half)
    wait_until(lambda: daemon.look(lambda inside: len(inside.clients.sessions)) < 4)

    all_is_well(path)
    for raw in held:
        raw.close()
    wait_until(lambda: not daemon.look(lambda inside: inside.clients._held_bytes))


def test_a_frame_that_stays_half_ends_its_connection(
    daemon: LocalDaemon, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FRAME_TIMEOUT_S", 0.2)
    with Raw(path) as raw:
        raw.socket.sendall(STATS[:-1])

        status, told = raw.answer()

        assert (status, b"did not come within" in told) == (ReplyStatus.ERROR, True)
        with pytest.raises(ConnectionError):
            raw.answer()
    all_is_well(path)


def test_whole_frames_one_behind_the_other_are_never_late(
    daemon: LocalDaemon, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FRAME_TIMEOUT_S", 0.5)
    frame = STATS
    with Raw(path) as raw:
        raw.socket.sendall(frame[:5])
        for _ in range(20):  # for longer than one frame has
            assert not wait_a_little(raw)
            raw.socket.sendall(frame[5:] + frame[:5])
            assert raw.answer()[0] is ReplyStatus.OK


def wait_a_little(raw: Raw) -> bytes:
    """Nothing may come within a twentieth of a second."""
    raw.socket.settimeout(0.05)
    try:
        return raw.socket.recv(1)
    except TimeoutError:
        return b""
    finally:
        raw.socket.settimeout(30)


def test_a_client_that_takes_no_answers_piles_up_none(daemon: LocalDaemon, path: Path) -> None:
    with Raw(path) as raw:
        raw.socket.settimeout(0.5)
        many = STATS * 1_000_000
        with pytest.raises(TimeoutError):  # the daemon reads no further
            raw.socket.sendall(many)

        def num_written(inside: object) -> int:
            channels = daemon.daemon.clients._channels
            return max(c._transport.get_write_buffer_size() for c in channels if c._transport is not None)

        assert daemon.look(num_written) < 256 << 10
        all_is_well(path)

        raw.socket.settimeout(30)
        for _ in range(50):  # and goes on as soon as they are taken
            assert raw.answer()[0] is ReplyStatus.OK


def test_saying_hello_to_no_session_again_and_again_ends_the_connection(daemon: LocalDaemon, path: Path) -> None:
    with Raw(path, hello=False) as raw:
        raw.socket.sendall(encode_frame(Kind.ATTACH, b'{"session": "none"}'))

        assert raw.answer()[0] is ReplyStatus.GONE
        with pytest.raises(ConnectionError):
            raw.answer()


def test_a_hello_of_half_a_surrogate_pair_is_refused_by_its_field(daemon: LocalDaemon, path: Path) -> None:
    with Raw(path, hello=False) as raw:
        names = {"layout": layout_to_json(LAYOUT), "namespace": {**namespace_to_json(namespace()), "salt": "\ud800"}}
        raw.socket.sendall(encode_frame(Kind.HELLO, encode_json(names)))

        status, told = raw.answer()

        assert (status, b"namespace.salt" in told) == (ReplyStatus.ERROR, True)


def test_a_client_of_the_release_before_is_told_in_words_that_it_can_read(daemon: LocalDaemon, path: Path) -> None:
    names = {"layout": layout_to_json(LAYOUT), "namespace": namespace_to_json(namespace()), "client": "old"}
    body = encode_json(names)
    hello, form = 1, struct.Struct("<HBBB3xII")  # as it was packed then
    with Raw(path, hello=False) as raw:
        raw.socket.sendall(form.pack(0x564B, 1, hello, 0, len(body), 1) + body)

        magic, version, _, status, num_bytes, _ = form.unpack(raw._exactly(form.size))
        told = json.loads(raw._exactly(num_bytes))

        assert (magic, version, status) == (0x564B, 1, 2)  # a frame of its version: an error
        assert "the other side speaks version 1 of the protocol" in told["message"]
        assert "install the same release" in told["message"]
        with pytest.raises(ConnectionError):
            raw.answer()
    all_is_well(path)


CALLS = {
    "nothing": b"",
    "an unknown verb": msgspec.msgpack.encode([99]),
    "no number": msgspec.msgpack.encode(["Lookup"]),
    "a map": msgspec.msgpack.encode({"lease": 1}),
    "too few fields": msgspec.msgpack.encode([8]),
    "too many fields": msgspec.msgpack.encode([8, 1, 2]),
    "a negative lease": msgspec.msgpack.encode([8, -1]),
    "a lease of 64 bits": msgspec.msgpack.encode([8, 1 << 63]),
    "bytes behind the end": msgspec.msgpack.encode([8, 1]) + b"x",
    "a list that is announced": bytes.fromhex("9307 01 dd ffffffff"),
    "bytes that are announced": bytes.fromhex("940c 95010090 1000 dbffffffff c2"),
    "a very deep list": b"\x91" * 100_000,
    "a text that is too long": msgspec.msgpack.encode([12, [1, 0, [], 16, 0], "x" * 1025, False]),
    "no UTF-8": bytes.fromhex("940c 95010090 1000 a2c328 c2"),
    "a wait that is no number": msgspec.msgpack.encode([17, float("nan")]),
    "a wait without end": msgspec.msgpack.encode([17, 601.0]),
    "keys of another length": msgspec.msgpack.encode([23, [1, 0, [b"x" * 31], 16, 0, None]]),
    "more keys than a piece": msgspec.msgpack.encode([23, [1, 0, [b"x" * 32] * ((1 << 14) + 1), 1 << 20, 0, None]]),
    "options of another type": msgspec.msgpack.encode([23, [1, 0, [], 16, 0, ["s", "high"]]]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_none_is_told_and_ends_its_connection_alone(daemon: LocalDaemon, path: Path, name: str) -> None:
    with Raw(path) as raw:
        raw.socket.sendall(encode_frame(Kind.CALL, CALLS[name]))

        status, told = raw.answer()

        assert (status, b"is not valid" in told) == (ReplyStatus.ERROR, True)
        with pytest.raises(ConnectionError):
            raw.answer()
    all_is_well(path)


class TestLongPrompts:
    def test_a_prompt_of_more_blocks_than_a_message_holds_is_found_and_saved(
        self, daemon: LocalDaemon, path: Path
    ) -> None:
        long = np.arange(300_000 * BLOCK + 1) % 50_000
        with attach(path, call_timeout_s=20.0) as store, attach(path, client="neighbour") as neighbour:
            save(store, store.request(long[: 10 * BLOCK + 1]))
            lease = neighbour.prepare_save(neighbour.request(prompt(3)), 0, 3)
            request = store.request(long)

            assert load(store, request)[0] == 10
            assert save(store, request, 10, 5) == 5
            store.keep.finished(request)

            assert load(store, store.request(long[: 20 * BLOCK + 1]))[0] == 15
            neighbour.complete(lease)
            assert (store.num_attached, neighbour.num_attached) == (1, 1)

    def test_one_that_is_too_long_is_refused_with_the_number_and_hurts_nothing(
        self, daemon: LocalDaemon, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(messages, "MAX_KEYS", 100)
        with attach(path) as store:
            lease = store.prepare_save(store.request(prompt(3)), 0, 3)
            request = store.request(prompt(101))
            for ask in (store.lookup, store.peek, store.prefetch, store.keep.pin, store.keep.finished):
                with pytest.raises(RequestError, match="request has 101 blocks; a daemon takes at most 100"):
                    ask(request)
            with pytest.raises(RequestError, match="101 blocks"):
                store.prepare_save(request, 0, 8)

            store.complete(lease)
            assert store.num_attached == 1
            assert store.lookup(store.request(prompt(3))).num_blocks == 3

    def test_pieces_are_sent_once_and_again_to_a_daemon_that_forgot(
        self, daemon: LocalDaemon, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calls, "PIECE_KEYS", 4)
        with attach(path) as store:
            save(store, store.request(prompt(13)))
            request = store.request(prompt(13))
            assert store.lookup(request).num_blocks == 13
            assert store.lookup(request).num_blocks == 13

            daemon.look(lambda inside: [session.requests.clear() for session in inside.clients.sessions.values()])

            assert store.lookup(request).num_blocks == 13
            assert store.peek(store.request(prompt(13))).num_blocks == 13
            assert store.num_attached == 1

    def test_a_lease_of_more_pages_than_an_answer_can_tell_is_cut(
        self, daemon: LocalDaemon, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(messages, "MAX_LEASE_PAGES", 6)
        with attach(path) as store:
            request = store.request(prompt(10))
            lease = store.prepare_save(request, 0, 10)
            assert ([page.block for page in lease.pages], lease.skipped) == (list(range(6)), 4)
            store.release(lease)
            assert save(store, request, 0, 6) == 6
            assert save(store, request, 6, 4) == 4
            reading = store.prepare_load(request, 10)
            assert reading.num_blocks == 6
            store.complete(reading)
