"""Writes the store's recording (kvstore/recording.py) off the path of requests.

A request that is over is put into a bounded queue, which costs a microsecond under the store's lock; a thread writes
what is there four times a second. Where the queue is full, or the file cannot be written, requests are dropped and
counted: nothing waits for a recording. Each batch goes out in one write at the end of the file, so a process that is
killed leaves at most its last line cut, and loses a quarter of a second.

Several stores and processes may write to one file: they take turns by its lock. When it is full, it becomes FILE.1,
that one FILE.2, and the oldest goes, so all of them are within the bound.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.forks import forbid
from kvstore.move.threads import start_all
from kvstore.plan.ended import EndedRequest
from kvstore.recording import KEY_BYTES, RecordWriter

log = logging.getLogger(__name__)

MAX_QUEUED = 8192  # requests; as many as a busy node ends in some minutes
NUM_FILES = 4
WRITE_BYTES = 1 << 20  # at once; a file is above its bound by no more
WRITE_EVERY_S = 0.25
CLOSE_WITHIN_S = 5.0
OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class TrafficRecorder:
    """`put` under the store's lock; the rest of any thread.

    num_written, num_dropped: requests so far.
    """

    def __init__(self, path: Path, block_tokens: int, max_bytes: int) -> None:
        """Open the file. max_bytes: of all its parts. Raises ConfigError if it cannot be written."""
        self._path = path
        self._part_bytes = max(1, max_bytes // NUM_FILES)
        self._queue: deque[tuple[float, EndedRequest]] = deque()
        self._fd = -1
        self._is_failing = False
        self.num_written = self.num_dropped = 0
        try:
            self._lines = RecordWriter(_key(path.with_name(path.name + ".key")), block_tokens)
            self._lock_file()
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError as error:
            self._close_file()
            raise ConfigError(f"store.record: {path} cannot be written: {error.strerror}") from None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-recorder", daemon=True)
        forbid(self)
        start_all([self._thread], self._close_file)

    def put(self, ended: EndedRequest) -> None:
        """Have a request written, or count it as dropped. Never waits."""
        if len(self._queue) < MAX_QUEUED:
            self._queue.append((time.time(), ended))
        else:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what is left, within some seconds. Idempotent."""
        self._closing.set()
        self._thread.join(CLOSE_WITHIN_S)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(WRITE_EVERY_S):
            self._write_all()
        self._write_all()
        self._close_file()

    def _write_all(self) -> None:
        while self._queue:
            num_taken = 0
            try:
                room = self._lock_file()
                try:
                    batch = bytearray()
                    while self._queue and len(batch) < min(room, WRITE_BYTES):
                        num_taken += 1
                        batch += self._lines.line(*self._queue.popleft())
                    _write(self._fd, batch)
                finally:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                self.num_written += num_taken
                self._is_failing = False
            except Exception as error:
                # A recording is never worth an engine's request: whatever it is, it is told once and counted.
                self.num_dropped += num_taken + len(self._queue)
                self._queue.clear()
                self._close_file()
                if not self._is_failing:
                    log.warning("%s cannot be written: %s; requests are not recorded", self._path, error)
                self._is_failing = True

    def _lock_file(self) -> int:
        """Open and lock the file that is to be written to now; return the bytes that it has room for."""
        while True:
            if self._fd < 0:
                self._fd = os.open(self._path, OPEN, 0o600)
                is_new = True
            else:
                is_new = False
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            size = os.fstat(self._fd).st_size
            if not _is_same(self._fd, self._path):  # another writer has begun a new one
                self._close_file()
                continue
            if size >= self._part_bytes:
                _shift(self._path)
                self._close_file()
                continue
            if is_new:
                # What a killed process has left of its last line must not run into ours.
                _write(self._fd, (b"\n" if size and not _ends_line(self._path, size) else b"") + self._lines.header())
            return self._part_bytes - size

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # the lock goes with it
            self._fd = -1


def _key(path: Path) -> bytes:
    """The key beside a recording, made if there is none."""
    made = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write(fd, secrets.token_bytes(KEY_BYTES))
        os.close(fd)
        with suppress(FileExistsError):
            os.link(made, path)  # whole or not at all, and of many writers the first
    finally:
        made.unlink()
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path} is not the key of a recording: it has {len(key)} bytes, not {KEY_BYTES}")
    return key


def _shift(path: Path) -> None:
    parts = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, NUM_FILES))]
    for older, newer in zip(reversed(parts), reversed(parts[:-1]), strict=False):
        if newer.exists():
            newer.replace(older)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _ends_line(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _write(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
