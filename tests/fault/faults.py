"""The faults that a store must live with: how each is made to happen to a store that is in use, and how it ends.

A `Fault` opens a `Scene`: a store over real tiers and the two verbs `strike` and `lift`. Everything is undone with the
ExitStack it is given. What needs root or a program that is not there says so in `needs`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eviction.registry import make_policy
from kvstore.plan.records import RequestOptions
from kvstore.plan.tier_plan import TierPlan
from kvstore.ports import free_port
from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis, RedisNotInstalled, find_redis_server
from kvstore.tiers.disk import private_files
from kvstore.tiers.disk.tier import DiskTier
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.proxy import Fault as Wire
from tests.helpers.proxy import Proxy
from tests.helpers.stores import LAYOUT, PAGE_BYTES, open_small, prompt, save, store_over, use
from tests.helpers.waiting import WAIT_S

NUM_SLOTS = 48
DISK_PAGES = 256
FEW_PAGES = 72  # a disk that is smaller than the prompts, so that there is always something to write
PROMPTS = [(8, seed) for seed in range(12)]  # 96 pages: twice the host slots, so that half of the hits come from below
LOOKUP_DEADLINE_S = 0.1
LOAD_DEADLINE_S = 0.5

Stats = dict[str, Any]


@dataclass(slots=True)
class Scene:
    """A store in use and what can happen to it.

    each:   called again and again while the fault lasts.
    seen:   given the statistics at the strike and now: has the fault been felt?
    healed: likewise, from the lifting on: does the tier serve again?
    """

    store: LocalStore
    strike: Callable[[], object] = lambda: None
    lift: Callable[[], object] = lambda: None
    each: Callable[[], object] = lambda: None
    seen: Callable[[Stats, Stats], bool] = lambda before, now: True
    healed: Callable[[Stats, Stats], bool] = lambda before, now: True


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault.

    open:          makes the scene in an empty directory.
    tier:          the tier that is hit.
    opens_breaker: the tier cannot be reached or does not do its work, so it is taken out.
    from_start:    it is there when the store opens; nothing can be warmed before.
    is_lifted:     False if no store can see its end.
    tokens_per_s:  what the engine says it computes, for load-or-recompute.
    needs:         why it cannot be played here; "" if it can.
    """

    name: str
    tier: str
    open: Callable[[ExitStack, Path], Scene]
    opens_breaker: bool = False
    from_start: bool = False
    is_lifted: bool = True
    tokens_per_s: float | None = None
    needs: Callable[[], str] = lambda: ""


# ---- what all scenes are made of -------------------------------------------------------------------------------------


def redis_store(stack: ExitStack, url: str, **store: Any) -> LocalStore:
    return stack.enter_context(open_small(None, url, **_sections(store), redis={"timeout_s": 0.3, **CONNECT}))


def disk_store(stack: ExitStack, path: Path, store: dict[str, Any] | None = None, **disk: Any) -> LocalStore:
    values = {"capacity_bytes": DISK_PAGES * PAGE_BYTES, "timeout_s": 0.5, **disk}
    return stack.enter_context(open_small(path, **_sections(store or {}), disk=values))


def faulty_disk_store(stack: ExitStack, path: Path) -> tuple[LocalStore, FaultyTier]:
    tier = FaultyTier(DiskTier.open(path, LAYOUT.fingerprint, LAYOUT.slot_bytes, DISK_PAGES * PAGE_BYTES))
    plan = TierPlan("disk", DISK_PAGES, make_policy("lru"), is_indexed=True, is_shared=False, workers=2)
    numbers: dict[str, Any] = {"lookup_deadline_s": LOOKUP_DEADLINE_S, "load_deadline_s": LOAD_DEADLINE_S}
    store = store_over([(tier, plan)], num_slots=NUM_SLOTS, timeout_s=0.5, **numbers)
    return stack.enter_context(store), tier


CONNECT = {"connect_timeout_s": 0.2}


def _sections(store: dict[str, Any]) -> dict[str, Any]:
    deadlines = {"lookup_deadline_s": LOOKUP_DEADLINE_S, "load_deadline_s": LOAD_DEADLINE_S}
    return {
        "store": {**deadlines, "load_or_recompute": False, "touch_interval_s": 0.5, **store},
        "host": {"capacity_bytes": NUM_SLOTS * PAGE_BYTES},
        "breaker": {"failures_to_open": 3, "probe_after_s": 0.1, "probe_max_s": 0.4},
    }


def more(name: str, tier: str, by: float = 1) -> Callable[[Stats, Stats], bool]:
    """True when the counter `name` of `tier` has grown."""
    return lambda before, now: now[name][tier] >= before[name][tier] + by


def hits(tier: str) -> Callable[[Stats, Stats], bool]:
    return more("hit_blocks", tier, 4)


def no_redis() -> str:
    try:
        find_redis_server()
    except RedisNotInstalled as error:
        return str(error)
    return ""


def redis_well(stack: ExitStack, path: Path) -> Scene:
    """Nothing happens: what the others are to be compared with."""
    return Scene(redis_store(stack, _server(stack).url), healed=hits("redis"))


def disk_well(stack: ExitStack, path: Path) -> Scene:
    """Nothing happens, on a disk that is smaller than the prompts."""
    return Scene(disk_store(stack, path, capacity_bytes=FEW_PAGES * PAGE_BYTES), healed=hits("disk"))


# ---- Redis -----------------------------------------------------------------------------------------------------------


def _server(stack: ExitStack, **options: Any) -> LocalRedis:
    return stack.enter_context(LocalRedis(**options))


def _late_server(stack: ExitStack) -> LocalRedis:
    """A server that has its port and has not been started."""
    server = LocalRedis()
    server.port = free_port()
    stack.callback(server.stop)
    return server


def redis_absent(stack: ExitStack, path: Path) -> Scene:
    """Packets to the port are dropped: connecting takes until its timeout. Then a server is there."""
    server = _late_server(stack)
    hole = stack.enter_context(black_hole(server.port))
    store = redis_store(stack, f"redis://127.0.0.1:{server.port}/0")

    def lift() -> None:
        hole()
        server.start()

    return Scene(store, lift=lift, seen=more("breaker_opens", "redis"), healed=hits("redis"))


def redis_refusing(stack: ExitStack, path: Path) -> Scene:
    server = _late_server(stack)
    store = redis_store(stack, f"redis://127.0.0.1:{server.port}/0")
    return Scene(store, lift=server.start, seen=more("breaker_opens", "redis"), healed=hits("redis"))


def redis_cut(stack: ExitStack, path: Path) -> Scene:
    """The connection ends in the middle of a page, and every later one as soon as it is answered."""
    proxy = stack.enter_context(Proxy(_server(stack).port))
    return Scene(
        redis_store(stack, f"redis://127.0.0.1:{proxy.port}/0"),
        lambda: proxy.arm(Wire.CUT, after_bytes=5000),
        lambda: proxy.arm(Wire.NONE),
        seen=more("breaker_opens", "redis"),
        healed=hits("redis"),
    )


def redis_garbled(stack: ExitStack, path: Path) -> Scene:
    """A bit of every few thousand is flipped on the way."""
    proxy = stack.enter_context(Proxy(_server(stack).port))
    return Scene(
        redis_store(stack, f"redis://127.0.0.1:{proxy.port}/0"),
        lift=lambda: proxy.arm(Wire.NONE),
        each=lambda: proxy.arm(Wire.GARBLE, after_bytes=3000),
        seen=more("corrupt_pages", "redis"),
        healed=hits("redis"),
    )


def redis_frozen(stack: ExitStack, path: Path) -> Scene:
    server = _server(stack)
    return Scene(
        redis_store(stack, server.url),
        server.freeze,
        server.thaw,
        seen=more("breaker_opens", "redis"),
        healed=hits("redis"),
    )


def redis_slow(stack: ExitStack, path: Path, **store: Any) -> Scene:
    """Every 4 KiB of a reply take 5 ms more: a page of 8 KiB about 15, and a whole prompt still less than allowed."""
    proxy = SlowProxy(_server(stack).port)
    stack.enter_context(proxy)

    def slow_down(seconds: float) -> None:
        proxy.delay_s = seconds

    felt = hits("redis") if not store else lambda before, now: now["cut"]["not_worth"] > before["cut"]["not_worth"]
    return Scene(
        redis_store(stack, f"redis://127.0.0.1:{proxy.port}/0", **store),
        lambda: slow_down(0.005),
        lambda: slow_down(0.0),
        seen=felt,
        healed=hits("redis"),
    )


def redis_slow_weighed(stack: ExitStack, path: Path) -> Scene:
    """The same, and the store may find that computing is faster."""
    return redis_slow(stack, path, load_or_recompute=True)


def redis_full(stack: ExitStack, path: Path) -> Scene:
    """No memory left and nothing may be evicted: writes are refused, reads work."""
    server = _server(stack, policy="noeviction")

    def limit(num_bytes: int) -> None:
        with server.client() as client:
            client.config_set("maxmemory", num_bytes)

    def strike() -> None:
        limit(1 << 20)
        _flush(server)  # else the server has every prompt already and is asked to write nothing

    return Scene(
        redis_store(stack, server.url),
        strike,
        lambda: limit(256 << 20),
        seen=more("spill_failures", "redis", 20),
        healed=hits("redis"),
    )


def redis_flushed(stack: ExitStack, path: Path) -> Scene:
    server = _server(stack)
    return Scene(redis_store(stack, server.url), lambda: _flush(server), healed=hits("redis"))


def redis_restarted(stack: ExitStack, path: Path) -> Scene:
    """Killed, away for a while, back and empty."""
    server = _server(stack)
    store = redis_store(stack, server.url)
    return Scene(store, server.kill, server.start, seen=more("breaker_opens", "redis"), healed=hits("redis"))


def _flush(server: LocalRedis) -> None:
    with server.client() as client:
        client.flushall()


@contextmanager
def black_hole(port: int) -> Iterator[Callable[[], None]]:
    """A port that takes no connection and refuses none: its queue is full. Yields what closes it."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(("127.0.0.1", port))
        yield stack.close


class SlowProxy(Proxy):
    """Every chunk of a reply waits `delay_s` before it is passed on."""

    delay_s = 0.0

    def _pass_chunk(self, data: bytes, client: socket.socket) -> bool:
        if self.delay_s:
            time.sleep(self.delay_s)
        return super()._pass_chunk(data, client)


def redis_and_disk(stack: ExitStack, path: Path) -> Scene:
    """Everything below host memory fails at once: Redis does not answer and the disk gives and takes no byte."""
    server = _server(stack)
    values = {"capacity_bytes": FEW_PAGES * PAGE_BYTES, "timeout_s": 0.5}
    store = stack.enter_context(
        open_small(path, server.url, **_sections({}), disk=values, redis={"timeout_s": 0.3, **CONNECT})
    )
    slab = broken_slab(store, errno.EIO)

    def strike() -> None:
        server.freeze()
        slab.strike()

    def lift() -> None:
        server.thaw()
        slab.lift()

    def both(name: str, by: int) -> Callable[[Stats, Stats], bool]:
        return lambda before, now: all(more(name, tier, by)(before, now) for tier in ("redis", "disk"))

    return Scene(store, strike, lift, seen=both("breaker_opens", 1), healed=both("hit_blocks", 4))


# ---- disk ------------------------------------------------------------------------------------------------------------


def disk_full(stack: ExitStack, path: Path) -> Scene:
    """A filesystem that cannot set blocks aside (as many network ones cannot) is full: most slots have no place."""
    mount_small(stack, path, "8m")
    filler = path / "filler"
    with without_fallocate():
        store = disk_store(stack, path / "pages")
    fill(filler, leave=20 * PAGE_BYTES)
    return Scene(
        store,
        lift=filler.unlink,
        seen=more("spill_failures", "disk", 20),
        healed=lambda before, now: hits("disk")(before, now) and more("spilled_pages", "disk")(before, now),
    )


def disk_full_later(stack: ExitStack, path: Path) -> Scene:
    """The same with blocks set aside at the opening, as local filesystems do: nothing is felt."""
    mount_small(stack, path, "8m")
    filler = path / "filler"
    store = disk_store(stack, path / "pages", capacity_bytes=FEW_PAGES * PAGE_BYTES)
    return Scene(
        store,
        lambda: fill(filler),
        filler.unlink,
        seen=lambda before, now: hits("disk")(before, now) and more("spilled_pages", "disk", 20)(before, now),
        healed=hits("disk"),
    )


@dataclass(slots=True)
class BrokenSlab:
    """Lets the system calls on a running store's slab file fail with `number`, as the kernel would."""

    slab: Any
    number: int
    verbs: tuple[str, ...]

    def strike(self) -> None:
        def fail(*_: object) -> None:
            raise OSError(self.number, os.strerror(self.number))

        for verb in self.verbs:
            setattr(self.slab, verb, fail)

    def lift(self) -> None:
        for verb in self.verbs:
            delattr(self.slab, verb)


def broken_slab(store: LocalStore, number: int, verbs: tuple[str, ...] = ("read", "write")) -> BrokenSlab:
    tier: Any = store._dispatcher.lanes["disk"].tier
    return BrokenSlab(tier._directory.slab, number, verbs)


def disk_writes_fail(stack: ExitStack, path: Path, number: int) -> Scene:
    """Every write of a page fails; reads work."""
    store = disk_store(stack, path, capacity_bytes=FEW_PAGES * PAGE_BYTES)
    slab = broken_slab(store, number, ("write",))
    return Scene(
        store,
        slab.strike,
        slab.lift,
        seen=more("spill_failures", "disk", 20),
        healed=lambda before, now: hits("disk")(before, now) and more("spilled_pages", "disk")(before, now),
    )


def disk_reads_fail(stack: ExitStack, path: Path) -> Scene:
    """Every read of a page fails, as with a dying disk."""
    store = disk_store(stack, path)
    slab = broken_slab(store, errno.EIO, ("read",))
    return Scene(store, slab.strike, slab.lift, seen=more("load_failures", "disk", 4), healed=hits("disk"))


def disk_read_only(stack: ExitStack, path: Path) -> Scene:
    """Directory, slab file and index can no longer be written, not even by root; then they can."""
    store = disk_store(stack, path, capacity_bytes=FEW_PAGES * PAGE_BYTES)
    stack.callback(_make_mutable, path)
    return Scene(
        store,
        lambda: set_immutable(path, True),
        lambda: set_immutable(path, False),
        seen=more("breaker_opens", "disk"),
        healed=lambda before, now: hits("disk")(before, now) and more("spilled_pages", "disk")(before, now),
    )


def disk_turns_read_only(stack: ExitStack, path: Path) -> Scene:
    """The kernel finds an error in the filesystem and lets nobody write to it any more; only a new mount ends that."""
    device = mount_ext4(stack, path, "errors=remount-ro")
    store = disk_store(stack, path / "pages", capacity_bytes=FEW_PAGES * PAGE_BYTES)
    trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
    return Scene(store, lambda: trigger.write_text("a test"), seen=more("breaker_opens", "disk"))


def disk_truncated(stack: ExitStack, path: Path) -> Scene:
    """Somebody cuts the slab file to nothing."""
    store = disk_store(stack, path)
    return Scene(
        store,
        lambda: os.truncate(path / "pages.slab", 0),
        seen=more("load_failures", "disk", 4),  # lost, or corrupt once a write has made the file longer again
        healed=hits("disk"),
    )


def disk_index_flipped(stack: ExitStack, path: Path) -> Scene:
    """While the store was closed, one byte in a hundred of the index was changed."""
    warm(path)
    file = path / "index" / "data.mdb"
    data = bytearray(file.read_bytes())
    data[::100] = bytes(byte ^ 0x10 for byte in data[::100])
    file.write_bytes(data)
    return Scene(disk_store(stack, path), healed=hits("disk"))


def disk_index_garbage(stack: ExitStack, path: Path) -> Scene:
    """While the store was closed, the index became a file of something else."""
    warm(path)
    (path / "index" / "data.mdb").write_bytes(b"not an index" * 10_000)
    return Scene(disk_store(stack, path), healed=hits("disk"))


def disk_slab_missing(stack: ExitStack, path: Path) -> Scene:
    """While the store was closed, the slab file was deleted."""
    warm(path)
    (path / "pages.slab").unlink()
    return Scene(disk_store(stack, path), healed=hits("disk"))


def disk_hangs(stack: ExitStack, path: Path) -> Scene:
    """Calls to the disk do not come back, whatever time they were given."""
    store, tier = faulty_disk_store(stack, path)
    return Scene(
        store,
        lambda: tier.hang(honour_timeout=False),
        tier.recover,
        seen=more("breaker_opens", "disk"),
        healed=hits("disk"),
    )


def disk_unexpected(stack: ExitStack, path: Path) -> Scene:
    """The tier raises what no tier should raise."""
    store, tier = faulty_disk_store(stack, path)
    return Scene(
        store,
        lambda: tier.fail(error=ZeroDivisionError("a bug")),
        tier.recover,
        seen=more("breaker_opens", "disk"),
        healed=hits("disk"),
    )


def host_pinned(stack: ExitStack, path: Path) -> Scene:
    """Every host slot holds a page that somebody has pinned."""
    store = disk_store(stack, path, store={"max_pinned_fraction": 1.0})
    pinned: list[Any] = []

    def strike() -> None:
        for seed in range(1000, 2000):
            request = store.request(prompt(NUM_SLOTS, seed), RequestOptions(pin=True))
            save(store, request)
            store.keep.finished(request)
            pinned.append(request)
            if store.stats()["pinned_pages"] == NUM_SLOTS:
                return
        raise AssertionError(f"only {store.stats()['pinned_pages']} of {NUM_SLOTS} slots could be pinned")

    def lift() -> None:
        for request in pinned:
            store.keep.unpin(request)

    return Scene(
        store,
        strike,
        lift,
        seen=lambda before, now: now["skipped_saves"] >= before["skipped_saves"] + 20,
        healed=hits("disk"),
    )


def warm(path: Path) -> None:
    """Leave all prompts on disk."""
    with ExitStack() as stack:
        store = disk_store(stack, path)
        for blocks, seed in PROMPTS:
            use(store, prompt(blocks, seed))
            assert store.flush(
                WAIT_S
            )  # each at once: on a busy machine host memory would evict what is not written yet


def fill(filler: Path, leave: int = 0) -> None:
    """Write a file until its filesystem is full, then give `leave` bytes back."""
    with open(filler, "wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - leave))


@contextmanager
def without_fallocate() -> Iterator[None]:
    """Let the filesystem say that it cannot set blocks aside."""
    fallocate = private_files.fallocate

    def refuse(fd: int, num_bytes: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    private_files.fallocate = refuse
    try:
        yield
    finally:
        private_files.fallocate = fallocate


def mount_small(stack: ExitStack, path: Path, size: str) -> None:
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    stack.callback(_run, "umount", str(path))


def mount_ext4(stack: ExitStack, path: Path, options: str = "rw") -> str:
    """Mount a new filesystem of 64 MiB at `path`; return the name of its device."""
    image = path.with_suffix(".ext4")
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    stack.callback(image.unlink)
    _run("mkfs.ext4", "-q", str(image))
    _run("mount", "-o", f"loop,{options}", str(image), str(path))
    stack.callback(_run, "umount", str(path))
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next(Path(device).name for device, point, *_ in mounts if point == str(path))


def set_immutable(path: Path, on: bool) -> None:
    """Set or clear the attribute of the directory, the slab file and the index, so that nobody may write them.

    LMDB's lock file is left alone: it is mapped memory, and the kernel ends a process that writes to such memory when
    its file is immutable (SIGBUS).
    """
    _run("chattr", "+i" if on else "-i", str(path), str(path / "pages.slab"), str(path / "index" / "data.mdb"))


def _make_mutable(path: Path) -> None:
    with suppress(subprocess.SubprocessError):
        set_immutable(path, False)


def can(*commands: str) -> Callable[[], str]:
    """Whether these programs are there and may do what they do: only root may."""

    def needs() -> str:
        missing = [command for command in commands if shutil.which(command) is None]
        if os.geteuid() != 0:
            return f"needs root ({', '.join(commands)})"
        if missing:
            return f"needs {', '.join(missing)}"
        try:
            with ExitStack() as stack:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                TRIALS[commands[0]](stack, path)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{commands[0]} does not work here: {error}"
        return ""

    return functools.lru_cache(needs)


def _try_chattr(stack: ExitStack, path: Path) -> None:
    _run("chattr", "+i", str(path))
    _run("chattr", "-i", str(path))


def _mount_and_forget(stack: ExitStack, path: Path) -> None:
    (path / "kv").mkdir()
    mount_ext4(stack, path / "kv")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)


TRIALS: dict[str, Callable[[ExitStack, Path], None]] = {
    "mount": lambda stack, path: mount_small(stack, path, "1m"),
    "mkfs.ext4": _mount_and_forget,
    "chattr": _try_chattr,
}

# ---- all of them -----------------------------------------------------------------------------------------------------

EXT4 = can("mkfs.ext4", "mount", "umount")
FAULTS = [
    Fault("none, with Redis", "redis", redis_well, needs=no_redis),
    Fault("none, with a disk", "disk", disk_well),
    Fault("redis absent (packets dropped)", "redis", redis_absent, True, from_start=True, needs=no_redis),
    Fault("redis refuses connections", "redis", redis_refusing, True, from_start=True, needs=no_redis),
    Fault("redis cut in the middle of a reply", "redis", redis_cut, True, needs=no_redis),
    Fault("redis replies with flipped bits", "redis", redis_garbled, needs=no_redis),
    Fault("redis frozen (SIGSTOP)", "redis", redis_frozen, True, needs=no_redis),
    Fault("redis slow", "redis", redis_slow, needs=no_redis),
    Fault("redis slow, load or recompute", "redis", redis_slow_weighed, tokens_per_s=4000.0, needs=no_redis),
    Fault("redis full (OOM replies)", "redis", redis_full, needs=no_redis),
    Fault("redis flushed", "redis", redis_flushed, needs=no_redis),
    Fault("redis killed and restarted", "redis", redis_restarted, True, needs=no_redis),
    Fault("redis frozen and disk failing at once", "redis", redis_and_disk, True, needs=no_redis),
    Fault("disk full, nothing set aside", "disk", disk_full, from_start=True, needs=can("mount", "umount")),
    Fault("disk full, blocks set aside", "disk", disk_full_later, needs=can("mount", "umount")),
    Fault("disk writes fail with ENOSPC", "disk", partial(disk_writes_fail, number=errno.ENOSPC)),
    Fault("disk writes fail with EROFS", "disk", partial(disk_writes_fail, number=errno.EROFS)),
    Fault("disk reads fail with EIO", "disk", disk_reads_fail),
    Fault("disk files immutable (chattr +i)", "disk", disk_read_only, True, needs=can("chattr")),
    Fault("filesystem turns read-only", "disk", disk_turns_read_only, True, is_lifted=False, needs=EXT4),
    Fault("slab file truncated", "disk", disk_truncated),
    Fault("slab file deleted while closed", "disk", disk_slab_missing, from_start=True),
    Fault("index damaged while closed", "disk", disk_index_flipped, from_start=True),
    Fault("index replaced by garbage", "disk", disk_index_garbage, from_start=True),
    Fault("disk calls hang", "disk", disk_hangs, True),
    Fault("disk tier raises a bug", "disk", disk_unexpected, True),
    Fault("host full of pinned pages", "disk", host_pinned),
]
