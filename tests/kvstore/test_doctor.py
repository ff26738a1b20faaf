"""What the doctor finds: each line ok, warn or bad, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore import doctor
from kvstore.cli.app import app
from kvstore.config.sections import Config
from kvstore.doctor import Finding, examine
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers import memory_limit
from kvstore.units import GiB, MiB
from tests.helpers.redis_server import NEEDS_REDIS

pytestmark = pytest.mark.usefixtures("nothing_configured")


def finding(config: Config, what: str) -> Finding:
    [found] = [one for one in examine(config) if one.what == what]
    return found


def test_defaults_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "available_memory", lambda: 4 * GiB)

    found = examine(Config())

    assert [one for one in found if one.state == "bad"] == []
    assert finding(Config(), "tiers").found == "disk, redis"
    assert all(one.do for one in found if one.state == "warn")


def test_memory_that_is_not_there_is_bad_and_says_how_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "available_memory", lambda: 164 * MiB)

    found = finding(Config(), "memory")

    assert (found.state, found.do) == ("bad", "set host.capacity_bytes to at most 100MiB")


def test_a_disk_that_is_too_small_is_bad_and_nothing_is_left_there(tmp_path: Path) -> None:
    large, small = (Config(disk={"path": tmp_path, "capacity_bytes": size}) for size in (1 << 59, 1 << 20))

    assert finding(large, "disk.path").state == "bad"
    assert "set its capacity to at most" in finding(large, "disk.path").do
    assert finding(small, "disk.path").state == "ok"
    assert finding(small, "disk.path, O_DIRECT").state in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_a_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert finding(Config(disk={"path": tmp_path / "file" / "kv"}), "disk.path").state == "bad"


def test_a_server_that_nobody_reaches_is_bad() -> None:
    found = finding(Config(redis={"url": "redis://127.0.0.1:1"}), "redis.url")

    assert (found.state, found.found) == ("bad", "redis://127.0.0.1:1 is not reached")


@pytest.mark.parametrize("needs", [pytest.param("redis-server", marks=NEEDS_REDIS)])
def test_a_server_tells_its_version_and_a_policy_that_fills_up_is_a_warning(needs: str) -> None:
    with LocalRedis() as server:
        config = Config(redis={"url": server.url})
        assert finding(config, "redis.url").state == "ok"
        with server.client() as client:
            client.config_set("maxmemory-policy", "noeviction")

        found = finding(config, "redis.url")

    assert found.state == "warn"
    assert "maxmemory-policy allkeys-lfu" in found.do


def test_kernels_without_huge_pages_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force")
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path)

    states = [one.state for one in examine(Config()) if one.what == "huge pages"]

    assert states == ["ok", "warn"]


def test_the_command_prints_a_table_or_json_and_its_exit_code_tells(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    well = CliRunner().invoke(app, ["doctor", "--json", "--set", "host.capacity_bytes=1MiB"])
    ill = CliRunner().invoke(app, ["doctor", "--set", f"disk.path={tmp_path / 'file'}"])

    assert well.exit_code == 0
    assert {"what", "state", "found", "do"} == set(json.loads(well.output)[0])
    assert ill.exit_code == 1
    assert "is no directory that this user" in ill.output
