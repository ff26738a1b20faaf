"""The host slab: aligned slots of one piece of memory, private or shared, and a refusal before anything is taken."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore.tiers import host
from kvstore.tiers.host import HUGE_PAGE_BYTES, HostSlab
from kvstore.tiers.memory_limit import available_memory

SLOT_BYTES = 12_288


class TestAttach:
    def test_another_mapping_sees_the_same_bytes(self) -> None:
        slab = HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")

        other = HostSlab.attach(slab.handle)
        np.copyto(other.array(1), 9)

        assert slab.array(1)[0] == 9
        assert other.array(2).ctypes.data != slab.array(2).ctypes.data
        slab.close()
        assert other.array(1)[0] == 9
        other.close()

    def test_a_slab_of_another_size_is_refused(self) -> None:
        slab = HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")

        with pytest.raises(ConfigError, match="the handle says"):
            HostSlab.attach(slab.handle._replace(num_slots=4))
        slab.close()

    def test_a_slab_that_is_gone_is_an_os_error(self) -> None:
        slab = HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")
        handle = slab.handle
        slab.close()

        with pytest.raises(FileNotFoundError):
            HostSlab.attach(handle)


class TestSeals:
    @pytest.fixture
    def given(self) -> Iterator[int]:
        """The descriptor of a shared slab, as another process has it."""
        slab = HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")
        fd = os.open(slab.handle.path, os.O_RDWR)
        yield fd
        os.close(fd)
        slab.close()

    @pytest.mark.parametrize("num_bytes", [0, 1, 2 * SLOT_BYTES, 4 * SLOT_BYTES, 1 << 40])
    def test_who_was_given_a_slab_cannot_change_its_size(self, given: int, num_bytes: int) -> None:
        with pytest.raises(PermissionError):
            os.ftruncate(given, num_bytes)

        assert os.fstat(given).st_size == 3 * SLOT_BYTES

    def test_nor_write_or_allocate_behind_its_end(self, given: int) -> None:
        with pytest.raises(PermissionError):
            os.pwrite(given, b"x", 3 * SLOT_BYTES)
        with pytest.raises(PermissionError):
            os.posix_fallocate(given, 0, 4 * SLOT_BYTES)

    @pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_GROW, 0x10])
    def test_nor_add_a_seal_that_keeps_others_from_writing(self, given: int, seal: int) -> None:
        with pytest.raises(PermissionError):
            fcntl.fcntl(given, fcntl.F_ADD_SEALS, seal)

    def test_memory_of_slots_can_still_be_given_back_to_the_system(self) -> None:
        slab = HostSlab(3, 4096, shared_name="kvstore-test")
        slab.array(1)[:] = 7

        slab.discard([1])

        assert slab.array(1)[0] == 0
        slab.close()

    def test_an_older_kernel_seals_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.memfd_create

        def older(name: str, flags: int) -> int:
            if flags & 0x8:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(name, flags)

        monkeypatch.setattr(os, "memfd_create", older)
        slab = HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")

        with pytest.raises(PermissionError):
            os.ftruncate(slab.fileno(), 0)
        slab.close()

    def test_a_system_without_such_memory_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(name: str, flags: int) -> int:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(os, "memfd_create", none)

        with pytest.raises(ConfigError, match=r"shared memory.*memfd_create.*Function not implemented"):
            HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")


class TestAttachToPrivateMemory:
    def test_in_its_own_process_it_is_the_same_memory(self) -> None:
        slab = HostSlab(3, SLOT_BYTES)
        attached = HostSlab.attach(slab.handle)

        attached.array(2)[:] = 7

        assert slab.handle == slab.handle
        assert (slab.array(2) == 7).all()
        assert attached.array(0).ctypes.data == slab.array(0).ctypes.data
        attached.close()
        assert slab.array(2)[0] == 7  # whoever attached lets go for itself alone
        slab.close()

    def test_its_memory_stays_as_long_as_somebody_is_attached(self) -> None:
        slab = HostSlab(3, SLOT_BYTES)
        slab.array(1)[:] = 5
        attached = HostSlab.attach(slab.handle)

        slab.close()

        assert (attached.array(1) == 5).all()
        attached.close()

    def test_once_it_is_closed_nobody_attaches(self) -> None:
        slab = HostSlab(3, SLOT_BYTES)
        handle = slab.handle
        slab.close()

        with pytest.raises(FileNotFoundError, match="private memory of another process, or closed"):
            HostSlab.attach(handle)

    def test_another_process_does_not_attach_not_even_a_fork(self) -> None:
        slab = HostSlab(3, SLOT_BYTES)
        handle = slab.handle
        pid = os.fork()
        if pid == 0:
            try:
                HostSlab.attach(HostSlab(3, SLOT_BYTES).handle)
                HostSlab.attach(handle)
            except FileNotFoundError:
                os._exit(0)
            os._exit(1)

        assert os.waitpid(pid, 0)[1] == 0
        slab.close()

    def test_another_size_is_refused(self) -> None:
        slab = HostSlab(3, SLOT_BYTES)

        with pytest.raises(ConfigError, match="size"):
            HostSlab.attach(slab.handle._replace(num_slots=2))
        slab.close()


@pytest.mark.parametrize("shared_name", [None, "kvstore-test"])
class TestSlots:
    def test_slots_lie_end_to_end_and_start_at_a_huge_page(self, shared_name: str | None) -> None:
        slab = HostSlab(5, SLOT_BYTES, shared_name=shared_name)

        start = slab.buffer.ctypes.data
        assert start % HUGE_PAGE_BYTES == 0
        assert slab.buffer.nbytes == 5 * SLOT_BYTES
        for slot in range(5):
            assert slab.array(slot).ctypes.data == start + slot * SLOT_BYTES
            assert slab.array(slot).nbytes == slab.view(slot).nbytes == SLOT_BYTES
        slab.close()

    def test_view_array_and_buffer_are_the_same_bytes(self, shared_name: str | None) -> None:
        slab = HostSlab(3, SLOT_BYTES, shared_name=shared_name)

        np.copyto(slab.array(1), 7)
        slab.view(2)[:3] = b"abc"

        assert bytes(slab.view(1)) == b"\x07" * SLOT_BYTES
        assert slab.array(2)[:3].tobytes() == b"abc"
        assert slab.buffer[: SLOT_BYTES + 1].tolist() == [0] * SLOT_BYTES + [7]
        slab.close()

    def test_arrays_are_made_once_and_nothing_is_kept_for_each_slot_that_the_collector_walks(
        self, shared_name: str | None
    ) -> None:
        before = len(gc.get_objects())
        slab = HostSlab(3000, SLOT_BYTES, shared_name=shared_name, prefault=False)

        assert slab.array(1) is slab.array(1)
        assert np.frombuffer(slab.view(1), np.uint8).ctypes.data == slab.array(1).ctypes.data
        assert len(gc.get_objects()) - before < 300
        slab.close()

    def test_a_slot_that_is_not_there_is_refused(self, shared_name: str | None) -> None:
        slab = HostSlab(3, SLOT_BYTES, shared_name=shared_name)

        for slot in (-1, 3):
            with pytest.raises(IndexError, match="3"):
                slab.view(slot)
        slab.close()
        with pytest.raises(IndexError):
            slab.view(0)

    def test_a_view_outlives_the_slab_and_then_the_memory_goes(self, shared_name: str | None) -> None:
        def num_mappings() -> int:
            return sum(int(line.split()[1]) >= 1 << 16 for line in open("/proc/self/smaps") if line.startswith("Size:"))

        before = num_mappings()
        slab = HostSlab(64, 1 << 20, shared_name=shared_name)
        assert num_mappings() > before
        view = slab.view(63)
        view[:3] = b"abc"

        slab.close()
        slab.close()

        assert bytes(view[:3]) == b"abc"
        del view
        assert num_mappings() == before


def test_prefaulted_memory_is_resident() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    slab = HostSlab(64, 1 << 20)

    assert resident_bytes() - before > 60 << 20
    slab.close()


def test_kernels_without_the_newer_advice_are_served_by_touching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_MADV_POPULATE_WRITE", 9999)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9998)

    test_prefaulted_memory_is_resident()


def test_without_prefault_nothing_is_touched() -> None:
    before = int(Path("/proc/self/statm").read_text().split()[1])
    slab = HostSlab(256, 1 << 20, prefault=False, huge_pages=False)

    assert int(Path("/proc/self/statm").read_text().split()[1]) - before < (16 << 20) // mmap.PAGESIZE
    slab.close()


def test_another_process_sees_the_slots_of_a_shared_slab() -> None:
    slab = HostSlab(3, SLOT_BYTES, shared_name="kvstore-test")
    slab.view(2)[:5] = b"hello"
    program = (
        "import mmap, sys\n"
        "fd, size, offset = map(int, sys.argv[1:])\n"
        "memory = mmap.mmap(fd, size)\n"
        "assert memory[offset : offset + 5] == b'hello'\n"
        "memory[offset : offset + 5] = b'world'\n"
    )

    numbers = [str(number) for number in (slab.fileno(), 3 * SLOT_BYTES, 2 * SLOT_BYTES)]
    subprocess.run([sys.executable, "-c", program, *numbers], pass_fds=[slab.fileno()], check=True)

    assert bytes(slab.view(2)[:5]) == b"world"
    slab.close()


def test_private_memory_has_no_descriptor_to_hand_over() -> None:
    slab = HostSlab(1, SLOT_BYTES)

    with pytest.raises(ValueError, match="shared_name"):
        slab.fileno()
    slab.close()


def test_a_closed_shared_slab_leaves_no_descriptor() -> None:
    before = sorted(os.listdir("/proc/self/fd"))

    slab = HostSlab(1, SLOT_BYTES, shared_name="kvstore-test")
    slab.close()

    assert sorted(os.listdir("/proc/self/fd")) == before


class TestBadConfiguration:
    def test_more_than_the_memory_names_the_field_and_what_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "available_memory", lambda: (64 << 20) + 10 * SLOT_BYTES + 5)

        with pytest.raises(
            ConfigError, match=rf"host\.capacity_bytes is {11 * SLOT_BYTES} .*{10 * SLOT_BYTES} \(10 sl"
        ):
            HostSlab(11, SLOT_BYTES)
        HostSlab(10, SLOT_BYTES).close()

    def test_more_than_this_machine_has_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"host\.capacity_bytes"):
            HostSlab(1 << 30, 1 << 20)

    def test_what_the_system_refuses_is_a_config_error_and_leaks_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(host, "available_memory", lambda: 1 << 62)

        for shared_name in (None, "kvstore-test"):
            with pytest.raises(ConfigError, match=r"host\.capacity_bytes"):
                HostSlab(1 << 40, 1 << 20, shared_name=shared_name)

        assert sorted(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize("slot_bytes", [0, -4096, 1000])
    def test_slots_that_are_not_whole_sectors_are_refused(self, slot_bytes: int) -> None:
        with pytest.raises(ConfigError, match=f"slot_bytes is {slot_bytes}; it must be a positive multiple of 4096"):
            HostSlab(1, slot_bytes)

    def test_no_slots_at_all_names_the_field(self) -> None:
        with pytest.raises(ConfigError, match=r"host\.capacity_bytes holds 0 slots"):
            HostSlab(0, SLOT_BYTES)


class TestAvailableMemory:
    @pytest.fixture
    def proc(self, tmp_path: Path) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
        (tmp_path / "proc/self/cgroup").write_text("0::/\n")
        return tmp_path / "proc"

    def group(self, folder: Path, limit: str, usage: int, inactive: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(usage))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")

    def test_without_a_group_the_machine_counts(self, proc: Path) -> None:
        assert available_memory(proc, proc / "no groups") == 800 * 1024

    def test_the_smallest_of_all_groups_above_counts(self, proc: Path) -> None:
        (proc / "self/cgroup").write_text("0::/a/b\n")
        self.group(proc / "groups/a", "1000", 300, 50)
        self.group(proc / "groups/a/b", "max", 300, 50)

        assert available_memory(proc, proc / "groups") == 1000 - 300 + 50

    def test_a_path_that_is_not_mounted_here_means_the_root_of_the_container(self, proc: Path) -> None:
        (proc / "self/cgroup").write_text("0::/docker/1234\n")
        self.group(proc / "groups", "500", 100, 0)

        assert available_memory(proc, proc / "groups") == 400

    def test_the_first_version_of_groups_is_understood(self, proc: Path) -> None:
        (proc / "self/cgroup").write_text("5:devices:/x\n4:cpu,memory:/job\n")
        folder = proc / "groups/memory/job"
        folder.mkdir(parents=True)
        (folder / "memory.limit_in_bytes").write_text("2000")
        (folder / "memory.usage_in_bytes").write_text("2500")
        (folder / "memory.stat").write_text("total_inactive_file 100\n")

        assert available_memory(proc, proc / "groups") == 0

    def test_no_limit_is_no_limit(self, proc: Path) -> None:
        (proc / "self/cgroup").write_text("4:memory:/\n")
        (proc / "groups/memory").mkdir(parents=True)
        (proc / "groups/memory/memory.limit_in_bytes").write_text("9223372036854771712")
        (proc / "groups/memory/memory.usage_in_bytes").write_text("5")
        (proc / "groups/memory/memory.stat").write_text("total_inactive_file 1\n")

        assert available_memory(proc, proc / "groups") == 800 * 1024

    def test_what_cannot_be_read_limits_nothing(self, tmp_path: Path) -> None:
        assert available_memory(tmp_path, tmp_path) == 1 << 60
