"""Readers and writers of one index, in processes that may have the same number or die at any moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, Popen

import lmdb
import pytest

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.testing.pages import TIMEOUT_S, fetch, key_of, keys_of, payload, store
from kvstore.tiers.disk import directory_lock
from kvstore.tiers.disk.directory_lock import DirectoryLock
from kvstore.tiers.disk.index_snapshots import RING, IndexSnapshots
from kvstore.tiers.disk.report import describe, verify
from tests.helpers.disk import SLOT_BYTES, check_slots, index_of, open_disk
from tests.helpers.interrupts import interrupted_at

ROOT = Path(__file__).parents[4]
NUM_RECORDS = 400


class Table:
    """An environment as the disk tier opens it, with records that every transaction changes all at once."""

    def __init__(self, path: Path) -> None:
        self.env = lmdb.open(str(path / "index"), lock=False, sync=False, map_size=64 << 20, lib_version=0)
        self.lock = DirectoryLock(path / "lock")
        self.snapshots = IndexSnapshots(self.env, self.lock)

    def write(self, timeout_s: float = TIMEOUT_S, *, note: bool = True) -> int:
        """Give all records the next value; return the number of the transaction."""
        deadline = time.monotonic() + timeout_s
        with self.lock.writing(deadline):
            with self.env.begin(write=True) as txn:
                number = int(txn.id())
                self.snapshots.wait_for_readers(number - 2, deadline)
                for record in range(NUM_RECORDS):
                    txn.put(b"%06d" % record, b"%020d" % number * 20)
            if note:
                self.snapshots.note(number)
        return number

    def read(self, in_the_middle: Callable[[], None] = lambda: None) -> set[bytes]:
        """The values of all records, in one transaction that takes its time."""
        with self.snapshots.reading() as txn:
            values = {bytes(txn.get(b"%06d" % record)) for record in range(NUM_RECORDS // 2)}
            in_the_middle()
            return values | {bytes(txn.get(b"%06d" % record)) for record in range(NUM_RECORDS // 2, NUM_RECORDS)}

    def close(self) -> None:
        self.env.close()
        self.lock.close()


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    with closing(Table(tmp_path)) as table:
        table.write()
        yield table


CHILD = """
import os, sys, time
from pathlib import Path
from tests.kvstore.tiers.disk.test_index_snapshots import Table
table = Table(Path(sys.argv[1]))
"""


def run_child(program: str, path: Path, *before: str) -> Popen[bytes]:
    return Popen([*before, sys.executable, "-c", CHILD + program, str(path)], stdout=PIPE, stdin=PIPE, cwd=ROOT)


def say(child: Popen[bytes]) -> bytes:
    assert child.stdout is not None
    return child.stdout.readline()


def end(child: Popen[bytes], sign: int = signal.SIGKILL) -> None:
    child.send_signal(sign)
    child.communicate()


READ_SLOWLY = """
def wait():
    print("reading", flush=True)
    sys.stdin.readline()
print(len(table.read(wait)), flush=True)
"""


class TestOneProcess:
    def test_a_reader_sees_one_state_while_others_are_written(self, table: Table) -> None:
        assert table.read(lambda: [table.write()]) == {b"%020d" % (table.env.info()["last_txnid"] - 1) * 20}

    def test_a_writer_waits_for_the_reader_whose_pages_it_would_write_over(self, table: Table) -> None:
        def write_twice() -> None:
            table.write()
            with pytest.raises(TierUnavailable, match="a thread of this process has been reading an old state"):
                table.write(timeout_s=0.05)

        assert len(table.read(write_twice)) == 1
        assert table.write() == 3

    def test_threads_that_read_the_same_state_all_count(self, table: Table) -> None:
        with table.snapshots.reading():
            with table.snapshots.reading():
                pass
            table.write()
            with pytest.raises(TierUnavailable):
                table.write(timeout_s=0.0)
        table.write()

    def test_what_was_committed_and_not_noted_is_read_all_the_same(self, table: Table) -> None:
        number = table.write(note=False)

        assert table.read() == {b"%020d" % number * 20}
        assert table.lock.newest() == number  # healed

    @pytest.mark.parametrize("content", [b"", b"\0" * 44, b"\xff" * 44, random.Random(0).randbytes(100)])
    def test_a_note_of_garbage_does_not_matter(self, table: Table, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "elsewhere").write_bytes(content)
        fd = os.open(f"/proc/self/fd/{table.lock._fd}", os.O_RDWR)  # closing it would let go of the locks
        os.ftruncate(fd, 0)
        os.pwrite(fd, content, 0)

        assert len(table.read()) == 1
        number = table.write()
        assert table.read() == {b"%020d" % number * 20}
        os.close(fd)

    def test_a_note_that_cannot_be_written_does_not_matter(self, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(fd: int, data: bytes, offset: int) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)

        for _ in range(3):
            number = table.write()
            assert table.read() == {b"%020d" % number * 20}

    def test_an_exception_inside_lets_writers_go_on(self, table: Table) -> None:
        with pytest.raises(ZeroDivisionError), table.snapshots.reading():
            raise ZeroDivisionError
        for _ in range(4):
            table.write()

    def test_threads_read_right_while_others_write(self, table: Table) -> None:
        wrong: list[object] = []
        ended: list[bool] = []
        is_over = threading.Event()

        def read() -> None:
            while not is_over.is_set():
                values = table.read()
                if len(values) != 1:
                    wrong.append(values)
            ended.append(True)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(200):
            table.write()
        is_over.set()
        for reader in readers:
            reader.join()

        assert (wrong, ended) == ([], [True] * 3)


LOOK_AT_LOCKS = """
for _ in sys.stdin:
    print([byte for byte in range(6) if byte and table.lock._holder(byte) is not None], flush=True)
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt inside a finalizer
class TestInterrupts:
    """An exception at any line: no lock of the process is left, which would stop the writers of all others."""

    @pytest.fixture
    def held(self, table: Table, tmp_path: Path) -> Iterator[Callable[[], str]]:
        """Which bytes of the lock file another process finds held."""
        child = run_child(LOOK_AT_LOCKS, tmp_path)

        def ask() -> str:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            return say(child).decode().strip()

        assert ask() == "[]"
        with table.snapshots.reading():
            assert ask() != "[]"
        yield ask
        end(child)

    @pytest.mark.parametrize("is_noted", [True, False])
    def test_a_reader_that_is_interrupted_anywhere_holds_no_writer_up(
        self, table: Table, held: Callable[[], str], is_noted: bool
    ) -> None:
        n, where = 0, [""]
        while where:
            n += 1
            table.write(note=is_noted)
            with interrupted_at(n) as where, table.snapshots.reading():
                pass

            assert (held(), table.snapshots._readers) == ("[]", [set()] * RING), where
            on_a_thread(table.write)
        assert n > 20

    def test_a_writer_that_is_interrupted_anywhere_holds_no_writer_up(
        self, table: Table, held: Callable[[], str]
    ) -> None:
        n, where = 0, [""]
        while where:
            n += 1
            with interrupted_at(n) as where:
                table.write()

            assert held() == "[]", where
            on_a_thread(table.write)
        assert n > 20

    def test_a_call_of_the_tier_that_is_interrupted_anywhere_lets_the_directory_be_closed(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path / "disk")) as tier:
            n, where = 0, [""]
            while where:
                n += 1
                with interrupted_at(n) as where:
                    tier.contains(keys_of("a", 2), timeout_s=TIMEOUT_S)
                assert tier._directory._gate.drain(0.0), where
            assert n > 20
            store(tier, keys_of("a", 1), SLOT_BYTES)
            assert tier.contains(keys_of("a", 1), timeout_s=TIMEOUT_S) == [True]


def on_a_thread(write: Callable[[], object]) -> None:
    """A lock that is left to its thread is free for that thread only."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write).result()


class TestOtherProcesses:
    def test_a_writer_waits_for_readers_of_other_processes_and_says_which(self, table: Table, tmp_path: Path) -> None:
        child = run_child(READ_SLOWLY, tmp_path)
        assert say(child) == b"reading\n"
        table.write()

        with pytest.raises(TierUnavailable, match=f"process {child.pid} has been reading an old state"):
            table.write(timeout_s=0.05)

        assert child.communicate(b"\n")[0] == b"1\n"
        table.write()

    def test_a_reader_that_dies_stops_nobody(self, table: Table, tmp_path: Path) -> None:
        child = run_child(READ_SLOWLY, tmp_path)
        assert say(child) == b"reading\n"

        end(child)

        for _ in range(20):
            table.write()
        assert table.env.info()["last_pgno"] < 200  # every page was used again

    def test_a_reader_that_is_stopped_stops_writers_until_it_goes_on(self, table: Table, tmp_path: Path) -> None:
        child = run_child(READ_SLOWLY, tmp_path)
        assert say(child) == b"reading\n"
        child.send_signal(signal.SIGSTOP)
        table.write()

        with pytest.raises(TierUnavailable):
            table.write(timeout_s=0.05)
        assert len(table.read()) == 1  # readers go on

        child.send_signal(signal.SIGCONT)
        assert child.communicate(b"\n")[0] == b"1\n"
        table.write()

    def test_a_writer_that_dies_before_its_note_is_not_missed(self, table: Table, tmp_path: Path) -> None:
        child = run_child("table.write(note=False); os.kill(os.getpid(), 9)", tmp_path)
        child.communicate()

        assert table.read() == {b"%020d" % 2 * 20}
        assert table.write() == 3

    def test_a_writer_that_is_stopped_before_its_note_stops_readers_only_for_a_while(
        self, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvstore.tiers.disk.index_snapshots.READ_WAIT_S", 0.05)
        child = run_child(
            "def wait(number):\n    print('written', flush=True); sys.stdin.readline()\n"
            "table.snapshots.note = wait\ntable.write()\n",
            tmp_path,
        )
        assert say(child) == b"written\n"

        with pytest.raises(TierUnavailable, match="write lock"):
            table.read()

        end(child)
        assert table.read() == {b"%020d" % 2 * 20}

    def test_processes_that_are_killed_all_the_time_leave_readers_right(self, table: Table, tmp_path: Path) -> None:
        program = "while True:\n    table.write()\n    assert len(table.read()) == 1\n    print('.', flush=True)\n"
        for _ in range(5):
            children = [run_child(program, tmp_path) for _ in range(2)]
            for child in children:
                assert say(child) == b".\n"
            for _ in range(50):
                assert len(table.read()) == 1
                table.write()
            for child in children:
                assert child.poll() is None
                end(child)


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
)
UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@needs_namespaces
class TestContainers:
    """Processes that have the same number, each in a world of its own."""

    def test_two_processes_of_the_same_number_share_a_directory(self, tmp_path: Path) -> None:
        children = [
            Popen(
                [*UNSHARE, sys.executable, "-c", USE_DIRECTORY, str(tmp_path), name], stdout=PIPE, stdin=PIPE, cwd=ROOT
            )
            for name in ("one", "two")
        ]
        assert [say(child) for child in children] == [b"1\n", b"1\n"]  # both have it open

        for child in children:
            assert child.communicate(b"\n", timeout=120)[0] == b"16 of 16\n"
            assert child.returncode == 0
        with closing(open_disk(tmp_path, 64)) as tier:
            for name in ("one", "two"):
                assert fetch(tier, keys_of(name, 16), SLOT_BYTES) == [
                    payload(key, SLOT_BYTES) for key in keys_of(name, 16)
                ]
            check_slots(tier)

    def test_a_reader_of_the_same_number_is_not_taken_for_ones_own(self, tmp_path: Path) -> None:
        with closing(Table(tmp_path)) as table:
            table.write()
        reader = run_child(READ_SLOWLY, tmp_path, *UNSHARE)
        assert say(reader) == b"reading\n"
        writer = run_child(
            "table.write()\ntry:\n    table.write(0.05)\nexcept Exception as error:\n    print(error, flush=True)\n",
            tmp_path,
            *UNSHARE,
        )

        assert b"a process of another container has been reading an old state" in writer.communicate()[0]
        assert reader.communicate(b"\n")[0] == b"1\n"

    def test_the_end_of_a_process_of_the_same_number_takes_no_protection_away(self, tmp_path: Path) -> None:
        with closing(Table(tmp_path)) as table:
            table.write()
            reader = run_child(READ_SLOWLY, tmp_path, *UNSHARE)
            assert say(reader) == b"reading\n"
            run_child("assert len(table.read()) == 1\ntable.close()\n", tmp_path, *UNSHARE).communicate()
            table.write()

            with pytest.raises(TierUnavailable, match=r"another container|process"):
                table.write(timeout_s=0.05)

            assert reader.communicate(b"\n")[0] == b"1\n"


USE_DIRECTORY = """
import os, sys
from contextlib import closing
from pathlib import Path
from tests.helpers.disk import SLOT_BYTES, open_disk
from kvstore.testing.pages import fetch, keys_of, payload, store
with closing(open_disk(Path(sys.argv[1]), 64)) as tier:
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    keys = keys_of(sys.argv[2], 16)
    for key in keys:
        assert store(tier, [key], SLOT_BYTES) == [True]
    right = [page == payload(key, SLOT_BYTES) for key, page in zip(keys, fetch(tier, keys, SLOT_BYTES))]
    print(sum(right), "of", len(right), flush=True)
"""


class TestOtherMachines:
    def test_a_directory_that_another_machine_has_open_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        child = Popen([sys.executable, "-c", USE_DIRECTORY, str(tmp_path), "x"], stdout=PIPE, stdin=PIPE, cwd=ROOT)
        say(child)
        monkeypatch.setattr(directory_lock, "_BOOT_ID_BYTES", b"00000000-0000-0000-0000-000000000000")

        with pytest.raises(ConfigError, match="processes of another machine"):
            open_disk(tmp_path, 64)

        child.communicate(b"\n")
        open_disk(tmp_path, 64).close()

    def test_what_another_boot_left_is_looked_at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with closing(open_disk(tmp_path)) as tier:
            store(tier, [key_of("page")], SLOT_BYTES)
        monkeypatch.setattr(directory_lock, "_BOOT_ID_BYTES", b"00000000-0000-0000-0000-000000000000")

        assert describe(tmp_path)["pages"] == 1


class TestLooking:
    def test_looking_holds_no_writer_up(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, 64)) as tier:
            store(tier, keys_of("page", 20), SLOT_BYTES)
            pages = verify(tmp_path)
            next(pages)

            for number in range(10):
                assert store(tier, keys_of(f"more {number}", 2), SLOT_BYTES) == [True] * 2
            assert all(page.ok for page in pages)

    def test_the_walk_before_looking_works_beside_a_writer(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, 64)) as tier:
            store(tier, keys_of("page", 20), SLOT_BYTES)
            done: list[object] = []
            command = [sys.executable, "-m", "kvstore", "verify", str(tmp_path)]
            looking = threading.Thread(
                target=lambda: done.append(subprocess.run(command, cwd=ROOT, capture_output=True, check=False))
            )
            looking.start()
            number = 0
            while looking.is_alive():
                number += 1
                assert store(tier, keys_of(f"more {number}", 2), SLOT_BYTES) == [True] * 2
            looking.join()

            assert isinstance(done[0], subprocess.CompletedProcess)
            assert done[0].returncode == 0, done[0]
            assert index_of(tier).usage()["slots"] == 64
