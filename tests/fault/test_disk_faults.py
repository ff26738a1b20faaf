"""What happens to the disk tier when the disk, the filesystem or its own index fail: misses and clear errors, never a
crash.

Faults are real where the system can make them (small and read-only mounts, truncated and garbled files) and otherwise
raised where this package meets the operating system (os.preadv, os.pwritev).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from kvstore.direction import Direction
from kvstore.errors import ConfigError, TierRefused, TierUnavailable
from kvstore.page import PageMeta
from kvstore.testing.pages import TIMEOUT_S, fetch, filled, key_of, keys_of, payload, store
from kvstore.tiers.disk import private_files
from kvstore.tiers.disk.report import describe, verify
from kvstore.tiers.disk.tier import DiskTier
from tests.helpers.disk import SLOT_BYTES, check_slots, index_of, open_disk, record_of

ROOT = Path(__file__).parents[2]
KEYS = keys_of("page", 6)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A directory with KEYS in it."""
    with closing(open_disk(tmp_path / "cache")) as tier:
        assert all(store(tier, KEYS, SLOT_BYTES))
    return tmp_path / "cache"


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MiB of its own."""
    yield from mount(tmp_path / "small", ["-t", "tmpfs", "-o", "size=2m", "tmpfs"])


def mount(point: Path, arguments: list[str]) -> Iterator[Path]:
    point.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *arguments, str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this system does not let us mount: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


class TestFullDisk:
    def test_a_capacity_beyond_the_filesystem_is_refused_with_what_fits(self, small_mount: Path) -> None:
        with pytest.raises(ConfigError, match=r"disk\.capacity_bytes is 4194304, but .* only \d+ bytes for it"):
            open_disk(small_mount / "cache", 512)

        assert shutil.disk_usage(small_mount).free > 1 << 20  # nothing was taken
        with closing(open_disk(small_mount / "cache", 32)) as tier:
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6

    def test_a_disk_that_fills_while_reserving_is_refused_and_left_as_it_was(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = (pages / "pages.slab").stat().st_size

        with monkeypatch.context() as patch:
            patch.setattr(private_files, "fallocate", lambda fd, num_bytes: refuse(errno.ENOSPC))
            with pytest.raises(ConfigError, match=r"disk\.capacity_bytes"):
                open_disk(pages, 16)

        assert (pages / "pages.slab").stat().st_size == size
        check_all_there(pages)

    @pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM])
    def test_a_disk_without_preallocation_gets_a_sparse_file_and_the_log_says_so_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
    ) -> None:
        monkeypatch.setattr(private_files, "fallocate", lambda fd, num_bytes: refuse(code))

        with closing(open_disk(tmp_path)) as tier:
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6
            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "is a sparse file of 65536 bytes" in caplog.text

    def test_a_file_larger_than_the_limit_of_file_sizes_is_refused_with_the_reason(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, hard))
        try:
            with pytest.raises(ConfigError, match=r"disk\.capacity_bytes is 8388608, .*limit of file sizes"):
                open_disk(tmp_path / "cache", 1024)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_blocks_are_asked_of_the_kernel_where_the_filesystem_has_none_to_give(self, ext3: Path) -> None:
        before = written_bytes()

        with closing(open_disk(ext3 / "cache", 8192)) as tier:  # 64 MiB
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6
            assert (ext3 / "cache/pages.slab").stat().st_blocks * 512 < 1 << 20
            assert (ext3 / "cache/index/data.mdb").stat().st_blocks * 512 < 4 << 20
        assert written_bytes() - before < 8 << 20

    def test_a_full_disk_in_the_middle_of_writing_refuses_pages_and_recovers(self, small_mount: Path) -> None:
        with closing(open_disk(small_mount / "cache", 64)) as tier:
            os.truncate(small_mount / "cache/pages.slab", 0)  # the reserve is gone ...
            ballast = small_mount / "ballast"
            fill(ballast)  # ... and somebody else took the space

            assert store(tier, KEYS, SLOT_BYTES) == [False] * 6
            assert tier.counters.extra["no_room"] == 6

            ballast.unlink()
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6
            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
            check_slots(tier)

    def test_a_disk_that_is_full_from_the_start_names_the_path(self, small_mount: Path) -> None:
        fill(small_mount / "ballast")

        with pytest.raises(ConfigError, match=r"disk\.(path|capacity_bytes) is"):
            open_disk(small_mount / "cache", 8)

    def test_the_index_keeps_working_on_a_full_disk(self, small_mount: Path) -> None:
        with closing(open_disk(small_mount / "cache", 64)) as tier:
            fill(small_mount / "ballast")

            for number in range(40):
                assert store(tier, keys_of(f"page {number}", 4), SLOT_BYTES) == [True] * 4
            assert tier.counters.extra["no_room"] == 0


def refuse(code: int) -> int:
    """What the system call does where it fails."""
    ctypes.set_errno(code)
    return -1


def written_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("\nwrite_bytes: ")[1].split()[0])


@pytest.fixture
def ext3(tmp_path: Path) -> Iterator[Path]:
    """A filesystem without fallocate."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    if os.geteuid() or shutil.which("mkfs.ext3") is None:
        pytest.skip("needs root and mkfs.ext3")
    mount.mkdir()
    image.touch()
    os.truncate(image, 256 << 20)
    options = ["-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"]
    subprocess.run(["mkfs.ext3", *options, str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=False, capture_output=True).returncode:
        pytest.skip("no loop mounts here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert shutil.disk_usage(path.parent).free == 0


class TestReadOnlyDirectory:
    @pytest.fixture
    def frozen(self, pages: Path, tmp_path: Path) -> Iterator[Path]:
        """The same pages through a mount that refuses to write; chmod would not stop root."""
        point = tmp_path / "frozen"
        for mounted in mount(point, ["--bind", str(pages)]):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(mounted)], check=True)
            yield mounted

    def test_opening_to_write_names_the_field(self, frozen: Path) -> None:
        with pytest.raises(ConfigError, match=r"disk\.path is .*may write.*Read-only file system"):
            open_disk(frozen)

    def test_opening_to_read_serves_the_pages(self, frozen: Path) -> None:
        with closing(DiskTier.open(frozen, "layout", SLOT_BYTES, 0, read_only=True)) as tier:
            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
        assert describe(frozen)["pages"] == 6
        assert all(check.ok for check in verify(frozen))

    def test_a_disk_that_becomes_read_only_keeps_serving_and_says_that_it_takes_no_writes(
        self, pages: Path, tmp_path: Path
    ) -> None:
        for point in mount(tmp_path / "disk", ["-t", "tmpfs", "-o", "size=16m", "tmpfs"]):
            with closing(open_disk(point / "cache")) as tier:
                store(tier, KEYS, SLOT_BYTES)
                # What the kernel does to a filesystem with errors. It refuses while files are open for writing, unless
                # forced.
                blocked = subprocess.run(["mount", "-o", "remount,ro", str(point)], capture_output=True, check=False)
                if blocked.returncode == 0:
                    tier.ping(timeout_s=TIMEOUT_S)
                    tier.probe(Direction.READ, timeout_s=TIMEOUT_S)
                    for way in (Direction.WRITE, Direction.TOUCH, Direction.DELETE):
                        with pytest.raises(TierRefused) as refused:
                            tier.probe(way, timeout_s=TIMEOUT_S)
                        assert refused.value.reason == "EROFS"
                assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]

    def test_a_test_of_writes_sees_a_read_only_filesystem_and_one_of_reads_does_not_mind(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(open_disk(pages)) as tier:
            true_answer = os.fstatvfs

            def read_only(fd: int) -> os.statvfs_result:
                fields = list(true_answer(fd))
                fields[8] |= os.ST_RDONLY
                return os.statvfs_result(fields)

            monkeypatch.setattr(os, "fstatvfs", read_only)
            with pytest.raises(TierRefused, match="Read-only file system"):
                tier.probe(Direction.WRITE, timeout_s=TIMEOUT_S)
            tier.probe(Direction.READ, timeout_s=TIMEOUT_S)
            tier.ping(timeout_s=TIMEOUT_S)


class TestFailingDisk:
    def test_pages_that_cannot_be_read_are_misses_and_make_way(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(open_disk(pages)) as tier:
            bad_offset = record_of(tier, KEYS[2]).slot * SLOT_BYTES
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", failing(os.preadv, errno.EIO, at={bad_offset}))

                found = fetch(tier, KEYS, SLOT_BYTES)

            assert [data is not None for data in found] == [True, True, False, True, True, True]
            assert tier.counters.extra["read_errors"] == 1
            assert store(tier, KEYS[2:3], SLOT_BYTES) == [True]  # would be refused as present otherwise
            assert fetch(tier, KEYS[2:3], SLOT_BYTES) == [payload(KEYS[2], SLOT_BYTES)]

    def test_a_disk_that_reads_nothing_at_all_is_unavailable(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(open_disk(pages)) as tier:
            monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO))

            with pytest.raises(TierUnavailable, match="none of 6 pages could be read"):
                fetch(tier, KEYS, SLOT_BYTES)

    @pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
    def test_a_disk_that_writes_nothing_at_all_is_unavailable_and_recovers(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        with closing(open_disk(pages)) as tier:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwritev", failing(os.pwritev, code))
                with pytest.raises(TierUnavailable, match="no page could be written"):
                    store(tier, keys_of("new", 2), SLOT_BYTES)
            assert tier.counters.extra["write_errors"] == 2

            assert store(tier, keys_of("new", 2), SLOT_BYTES) == [True, True]
            check_slots(tier)

    def test_one_page_that_cannot_be_written_is_refused_alone(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new = keys_of("new", 2)
        with closing(open_disk(pages)) as tier:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwritev", failing(os.pwritev, errno.EIO, at={6 * SLOT_BYTES}))
                assert store(tier, new, SLOT_BYTES) == [False, True]

            assert tier.contains(new, timeout_s=TIMEOUT_S) == [False, True]
            check_slots(tier)

    def test_short_reads_and_writes_are_continued(self, pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        true_read, true_write = os.preadv, os.pwritev
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: true_read(fd, [views[0][:4096]], at))
        monkeypatch.setattr(os, "pwritev", lambda fd, views, at: true_write(fd, [views[0][:4096]], at))
        with closing(open_disk(pages)) as tier:
            assert store(tier, [key_of("new")], SLOT_BYTES) == [True]
            assert fetch(tier, [key_of("new"), *KEYS], SLOT_BYTES) == [
                payload(key, SLOT_BYTES) for key in [key_of("new"), *KEYS]
            ]

    def test_a_device_that_refuses_direct_transfers_is_used_through_the_page_cache(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(open_disk(pages)) as tier:
            if not tier.is_direct:
                pytest.skip("this filesystem has no O_DIRECT to lose")
            direct_fd = tier._directory.slab._direct_fd
            true_read = os.preadv

            def refuse(fd: int, views: list[memoryview], offset: int) -> int:
                if fd == direct_fd:
                    raise OSError(errno.EINVAL, "Invalid argument")
                return true_read(fd, views, offset)

            monkeypatch.setattr(os, "preadv", refuse)

            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
            assert not tier.is_direct

    def test_a_slot_view_that_is_not_aligned_still_works_and_costs_others_nothing(self, pages: Path) -> None:
        with closing(open_disk(pages)) as tier:
            was_direct = tier.is_direct
            view = memoryview(bytearray(SLOT_BYTES + 1))[1:]

            assert tier.read_into(KEYS[:1], [view], [PageMeta(SLOT_BYTES)], timeout_s=TIMEOUT_S) == [True]
            assert bytes(view) == payload(KEYS[0], SLOT_BYTES)
            view[:] = payload(key_of("new"), SLOT_BYTES)
            assert tier.write_from([key_of("new")], [view], [PageMeta(SLOT_BYTES)], timeout_s=TIMEOUT_S) == [True]

            assert fetch(tier, [key_of("new")], SLOT_BYTES) == [payload(key_of("new"), SLOT_BYTES)]
            assert tier.is_direct == was_direct

    def test_time_that_runs_out_between_pages_ends_the_batch(
        self, pages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(open_disk(pages)) as tier:
            clock = iter(range(1000))
            monkeypatch.setattr("kvstore.tiers.disk.tier.time.monotonic", lambda: float(next(clock)))
            views = filled(KEYS, SLOT_BYTES)

            with pytest.raises(TierUnavailable, match="2 of 6 pages read within 2"):
                tier.read_into(KEYS, views, [PageMeta(SLOT_BYTES)] * 6, timeout_s=2.0)


def failing(true: Callable[..., int], code: int, at: set[int] | None = None) -> Callable[..., int]:
    """A system call that fails at the offsets `at`, or everywhere."""

    def call(fd: int, views: list[memoryview], offset: int) -> int:
        if at is None or offset in at:
            raise OSError(code, os.strerror(code))
        return true(fd, views, offset)

    return call


class TestTruncatedSlab:
    def test_pages_beyond_the_end_are_counted_as_lost_at_opening(self, pages: Path) -> None:
        os.truncate(pages / "pages.slab", 4 * SLOT_BYTES + 100)

        with closing(open_disk(pages)) as tier:
            assert [data is not None for data in fetch(tier, KEYS, SLOT_BYTES)] == [True] * 4 + [False] * 2
            assert (tier.counters.lost_pages, tier.counters.corrupt_pages) == (2, 0)
            assert (pages / "pages.slab").stat().st_size == 8 * SLOT_BYTES
            assert store(tier, KEYS[4:], SLOT_BYTES) == [True, True]
            check_slots(tier)
        check_all_there(pages)

    def test_pages_beyond_the_end_are_lost_also_while_in_use(self, pages: Path) -> None:
        with closing(open_disk(pages)) as tier:
            os.truncate(pages / "pages.slab", 3 * SLOT_BYTES + 4096)

            assert [data is not None for data in fetch(tier, KEYS, SLOT_BYTES)] == [True] * 3 + [False] * 3
            assert (tier.counters.lost_pages, tier.counters.corrupt_pages) == (3, 0)
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6
            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]

    def test_a_slab_that_is_gone_is_made_again(self, pages: Path) -> None:
        (pages / "pages.slab").unlink()

        with closing(open_disk(pages)) as tier:
            assert fetch(tier, KEYS, SLOT_BYTES) == [None] * 6
            assert tier.counters.lost_pages == 6
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6

    def test_a_garbled_slab_serves_nothing_and_is_counted(self, pages: Path) -> None:
        (pages / "pages.slab").write_bytes(random.Random(0).randbytes(8 * SLOT_BYTES))

        assert [check.ok for check in verify(pages)] == [False] * 6
        with closing(open_disk(pages)) as tier:
            assert fetch(tier, KEYS, SLOT_BYTES) == [None] * 6
            assert tier.counters.corrupt_pages == 6


DAMAGE: dict[str, Callable[[Path], object]] = {
    "garbage": lambda data: data.write_bytes(random.Random(0).randbytes(data.stat().st_size)),
    "text": lambda data: data.write_text("this is not a database\n" * 1000),
    "empty": lambda data: data.write_bytes(b""),
    "half a page": lambda data: os.truncate(data, 2048),
    "one page": lambda data: os.truncate(data, 4096),
    "most of it missing": lambda data: os.truncate(data, 5 * 4096),
    "zeros behind the first pages": lambda data: overwrite(data, 8192, bytes(data.stat().st_size - 8192)),
    "garbage behind the first pages": lambda data: overwrite(
        data, 8192, random.Random(1).randbytes(data.stat().st_size - 8192)
    ),
    "both first pages": lambda data: overwrite(data, 0, random.Random(2).randbytes(8192)),
    "another version of LMDB": lambda data: list(map(make_newer, [data, data], [0, 4096])),
    "gone": lambda data: data.unlink(),
    "a directory": lambda data: replace_by_directory(data),
}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def make_newer(path: Path, page: int) -> None:
    overwrite(path, page + 20, b"\x02\0\0\0")  # mm_version of an LMDB meta page


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


class TestDamagedIndex:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_an_index_that_cannot_be_read_is_begun_anew(self, pages: Path, damage: str) -> None:
        DAMAGE[damage](pages / "index/data.mdb")

        with closing(open_disk(pages)) as tier:
            assert fetch(tier, KEYS, SLOT_BYTES) == [None] * 6
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6
            check_slots(tier)
        check_all_there(pages)

    def test_the_damaged_index_is_kept_for_a_look_and_the_log_says_so(
        self, pages: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        DAMAGE["garbage"](pages / "index/data.mdb")

        with caplog.at_level(logging.ERROR):
            open_disk(pages).close()

        assert (pages / "index.damaged/data.mdb").exists()
        assert "the index is damaged" in caplog.text

    @pytest.mark.parametrize("record", [b"geometry", b"state"])
    def test_damaged_basic_values_are_not_believed(self, pages: Path, record: bytes) -> None:
        env = lmdb.open(str(pages / "index"), max_dbs=8, lib_version=0)
        meta = env.open_db(b"meta")
        with env.begin(write=True) as txn:
            raw = bytearray(txn.get(record, db=meta) or b"")
            raw[12] ^= 4
            txn.put(record, bytes(raw), db=meta)
        env.close()

        with closing(open_disk(pages)) as tier:
            assert (pages / "index.damaged").exists()
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6

    def test_a_lock_file_of_garbage_does_not_matter(self, pages: Path) -> None:
        (pages / "index/lock.mdb").write_bytes(random.Random(0).randbytes(8192))
        (pages / "lock").write_bytes(random.Random(0).randbytes(100))

        check_all_there(pages)

    def test_looking_at_a_damaged_index_says_so_and_changes_nothing(self, pages: Path) -> None:
        DAMAGE["garbage behind the first pages"](pages / "index/data.mdb")
        before = (pages / "index/data.mdb").read_bytes()

        with pytest.raises(TierUnavailable, match="damaged"):
            describe(pages)

        assert (pages / "index/data.mdb").read_bytes() == before

    def test_an_index_that_fails_in_use_is_unavailable_until_a_ping_begins_it_anew(self, pages: Path) -> None:
        with closing(open_disk(pages)) as tier:
            index = index_of(tier)
            true_find = index.find

            def corrupted(keys: object) -> object:
                raise lmdb.CorruptedError("mdb_get: MDB_CORRUPTED: Located page was wrong type")

            index.find = corrupted  # type: ignore[method-assign,assignment]
            with pytest.raises(TierUnavailable, match="MDB_CORRUPTED"):
                fetch(tier, KEYS, SLOT_BYTES)
            index.find = true_find  # type: ignore[method-assign]
            with pytest.raises(TierUnavailable, match="MDB_CORRUPTED"):
                store(tier, KEYS, SLOT_BYTES)  # stays out until somebody asks for it to come back

            tier.ping(timeout_s=TIMEOUT_S)

            assert fetch(tier, KEYS, SLOT_BYTES) == [None] * 6
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 6
            check_slots(tier)

    def test_an_index_that_can_only_be_read_is_read(self, pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with closing(open_disk(pages)) as tier:
            index = index_of(tier)

            def refused(*args: object, **kwargs: object) -> None:
                raise lmdb.Error("mdb_txn_commit: Read-only file system")

            for verb in ("claim", "touch", "delete"):
                monkeypatch.setattr(index, verb, refused)
            for write in (
                lambda: store(tier, keys_of("new", 1), SLOT_BYTES),
                lambda: tier.touch(KEYS, expires_at=0.0, timeout_s=TIMEOUT_S),
                lambda: tier.delete(KEYS, timeout_s=TIMEOUT_S),
            ):
                with pytest.raises(TierRefused, match="cannot be written") as told:
                    write()
                assert told.value.reason == "EROFS"

            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]

    def test_an_index_that_fails_without_damage_keeps_its_pages(self, pages: Path) -> None:
        with closing(open_disk(pages)) as tier:
            index = index_of(tier)

            def failed(keys: object) -> object:
                raise lmdb.PanicError("mdb_txn_begin: MDB_PANIC")

            index.find = failed  # type: ignore[method-assign,assignment]
            with pytest.raises(TierUnavailable, match="MDB_PANIC"):
                fetch(tier, KEYS, SLOT_BYTES)

            tier.ping(timeout_s=TIMEOUT_S)

            assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]

    @pytest.mark.parametrize("seed", range(4))
    def test_random_damage_never_ends_the_process_and_never_serves_a_wrong_page(
        self, tmp_path: Path, seed: int
    ) -> None:
        # In a child: if LMDB should fall over, this test fails instead of ending all of them.
        done = subprocess.run([sys.executable, "-c", SURVIVE, str(tmp_path), str(seed)], cwd=ROOT, check=False)

        assert done.returncode == 0


SURVIVE = """
import logging, os, random, shutil, sys
from contextlib import closing, suppress
from pathlib import Path
from kvstore.errors import TierUnavailable
from tests.helpers.disk import SLOT_BYTES, open_disk
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store

logging.disable()
home, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
old, new = keys_of("old", 200), keys_of("new", 60)
with closing(open_disk(home / "sound", 220)) as tier:
    store(tier, old, SLOT_BYTES)
    used_bytes = 4096 * (tier._directory._index._env.info()["last_pgno"] + 1)

def use(tier):
    for keys in (old, new):
        for key, data in zip(keys, fetch(tier, keys, SLOT_BYTES)):
            assert data in (None, payload(key, SLOT_BYTES)), "a wrong page was served"
    list(tier.scan())
    store(tier, new, SLOT_BYTES)
    tier.touch(old[:50], expires_at=0.0, timeout_s=TIMEOUT_S)
    tier.delete(new[:20], timeout_s=TIMEOUT_S)

for number in range(8):
    path = home / str(number)
    shutil.copytree(home / "sound", path)
    with open(path / "index" / "data.mdb", "r+b") as file:
        for _ in range(rng.randrange(1, 8)):
            file.seek(rng.randrange(used_bytes))
            file.write(rng.randbytes(rng.choice([1, 1, 2, 16, 4096])))
    with closing(open_disk(path, 220)) as tier:
        for _ in range(3):
            try:
                use(tier)
            except TierUnavailable:
                with suppress(TierUnavailable):
                    tier.ping(timeout_s=TIMEOUT_S)
        tier.ping(timeout_s=TIMEOUT_S)
        use(tier)
    shutil.rmtree(path)
"""


def check_all_there(path: Path) -> None:
    with closing(open_disk(path)) as tier:
        assert fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS]
        check_slots(tier)
