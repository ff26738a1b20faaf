"""Every workload runs, small, and hands back what `kvstore bench` prints. How fast is no matter here."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import ConfigError, KVStoreError, TierUnavailable
from kvstore.lab import compiled
from kvstore.lab.bench import WORKLOADS, Table
from kvstore.lab.daemon_process import daemon_process
from kvstore.lab.workloads import (
    codec,
    device,
    disk,
    hash,
    host,
    index,
    model,
    planner,
    redis,
    service,
    service_bytes,
    sweep,
)
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis.url import parse_redis_url
from kvstore.units import KiB
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.tiny_models import tiny_model

MODULES = (codec, device, disk, hash, host, index, model, planner, redis, service, service_bytes, sweep)


def check(tables: list[Table], *units: str) -> None:
    assert [table.unit for table in tables] == list(units)
    for table in tables:
        assert table.timings[0].ratio == 1.0
        assert all(timing.ratio > 0 and timing.per_s > 0 and timing.amount > 0 for timing in table.timings)
        assert len({timing.name for timing in table.timings}) == len(table.timings)


def test_every_workload_of_the_list_has_its_module() -> None:
    modules = {module.__name__ for module in MODULES}

    assert {workload.module for workload in WORKLOADS.values()} == modules


def test_hash_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash, "NUM_TOKENS", 2048)

    check(hash.run("", True), "tokens")


def test_planner_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PROMPT_BLOCKS", 16)
    monkeypatch.setattr(planner, "SHARED_BLOCKS", 12)
    monkeypatch.setattr(planner, "NUM_SLOTS", 64)

    check(planner.run("", True), "blocks")


def test_host_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PAGE_SIZES", (4 * KiB, 8 * KiB))
    monkeypatch.setattr(host, "PROMPT_BYTES", 32 * KiB)
    monkeypatch.setattr(host, "QUICK_SLAB_BYTES", 64 * KiB)

    check(host.run("", True), "bytes", "bytes", "bytes", "bytes")


def test_index_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "QUICK_PROMPTS", 4)
    monkeypatch.setattr(index, "SYSTEM_BLOCKS", 4)
    monkeypatch.setattr(index, "OWN_BLOCKS", 6)

    check(index.run("", True), "blocks", "blocks")


@pytest.mark.skipif(not compiled.is_built, reason="kvstore.lab._sweep is not built")
def test_sweep_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "QUICK_REQUESTS", 40)

    check(sweep.run("", True), "references")


def test_device_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "QUICK_POOL_BYTES", 256 * KiB)
    shapes = (device.EngineShape("paged", 4, 1024, 3), device.EngineShape("contiguous", 2, 512, 5, heads=2))
    monkeypatch.setattr(device, "SHAPES", shapes)

    check(device.run("", True), "bytes", "bytes")


def test_service_runs_with_clients_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "NUM_SLOTS", 20)
    monkeypatch.setattr(service, "PROMPT_BLOCKS", (16, 32))
    monkeypatch.setattr(service, "QUICK_CALLS", 3)
    monkeypatch.setattr(service, "CROWD_PROCESSES", 2)

    check(service.run("", True), "calls", "calls")


def test_service_bytes_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_bytes, "PAGE_BYTES", 64 * KiB)
    monkeypatch.setattr(service_bytes, "BATCH_BYTES", 256 * KiB)

    check(service_bytes.run("", True), "bytes", "bytes")


def test_a_daemon_that_does_not_come_up_is_told() -> None:
    with (
        pytest.raises(KVStoreError, match=r"the daemon did not come up: .*disk\.path is /etc/passwd"),
        daemon_process(64 * KiB, "disk.path=/etc/passwd"),
    ):
        pass


@pytest.mark.redis
def test_model_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_model("llama_gqa").save_pretrained(tmp_path)
    monkeypatch.setattr(model, "NUM_TOKENS", 64)
    monkeypatch.setattr(model, "BLOCK_SIZE", 8)
    monkeypatch.setattr(model, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(model, "DELAY_S", 0.01)
    monkeypatch.setattr(model, "HOST_BYTES", "8MiB")
    monkeypatch.setattr(model, "DISK_BYTES", "8MiB")

    tables = model.run(str(tmp_path), True)

    check(tables, "tokens", "tokens")
    assert tables[0].timings[1].name == "with host, disk, redis, until all is written behind"


def test_disk_runs_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "PAGE_SIZES", (4 * KiB, 16 * KiB))
    monkeypatch.setattr(disk, "QUICK_BYTES", 128 * KiB)

    check(disk.run(str(tmp_path), True), "bytes", "bytes", "bytes", "bytes")
    assert list(tmp_path.iterdir()) == []


def test_disk_runs_beside_files_of_one_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "PAGE_SIZES", (16 * KiB,))
    monkeypatch.setattr(disk, "QUICK_BYTES", 128 * KiB)

    tables = disk.run(str(tmp_path), True, peer=True)

    check(tables, "bytes", "bytes")
    assert all(table.timings[-1].name.startswith("peer: a file for each page") for table in tables)
    assert list(tmp_path.iterdir()) == []


def test_disk_needs_a_directory_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bench disk: cannot make a directory in .*nowhere"):
        disk.run(str(tmp_path / "nowhere"), True)


@pytest.mark.redis
class TestRedis:
    pytestmark = NEEDS_REDIS

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis, "PAGE_SIZES", (4 * KiB, 16 * KiB))
        monkeypatch.setattr(redis, "QUICK_BYTES", 64 * KiB)

    @pytest.mark.parametrize("by", ["url", "unix_url"])
    def test_redis_runs_and_leaves_nothing_behind(self, by: str) -> None:
        with LocalRedis() as server:
            check(redis.run(getattr(server, by), True), "bytes", "bytes", "keys", "bytes", "bytes", "keys")

            assert server.client().dbsize() == 0

    def test_redis_runs_beside_the_plain_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis, "PAGE_SIZES", (16 * KiB,))
        with LocalRedis() as server:
            tables = redis.run(server.url, True, peer=True)

            assert server.client().dbsize() == 0
        check(tables, "bytes", "bytes", "keys")
        assert [table.timings[-1].name for table in tables[:2]] == ["peer: redis-py"] * 2

    def test_redis_starts_a_server_of_its_own(self) -> None:
        check(redis.run("local", True)[:1], "bytes")

    def test_bare_socket_logs_in_and_moves_values_of_any_size(self) -> None:
        with LocalRedis(password="s3cret") as server:
            bare = redis.BareSocket(parse_redis_url(server.url))
            for size in (1, 4095, 3 << 20):
                value = bytes(i % 251 for i in range(251)) * (size // 251 + 1)
                out = memoryview(bytearray(size))

                bare.set(b"k", memoryview(value)[:size])
                bare.get_into(b"k", out)

                assert out == memoryview(value)[:size]
            assert bare.exists([b"k", b"other", b"k"]) == 2
            bare.close()


def test_redis_that_is_not_there_is_told() -> None:
    with pytest.raises(TierUnavailable, match=r"bench redis: redis://127.0.0.1:1/0 cannot be reached"):
        redis.run("redis://127.0.0.1:1/0", True)


@pytest.mark.parametrize("url", ["rediss://h", "redis+cluster://h", "redis+sentinel://h/main"])
def test_redis_without_a_bare_socket_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="has no bare socket to compare with"):
        redis.run(url, True)
