"""Media of this machine are measured by the workloads of `kvstore bench`, here with few bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.measure import measure
from kvstore.lab.workloads import disk, host, redis
from kvstore.testing.redis_server import LocalRedis
from kvstore.units import MiB


def test_host_memory_and_a_directory_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((host, "PROMPT_BYTES"), (host, "QUICK_SLAB_BYTES"), (disk, "QUICK_BYTES")):
        monkeypatch.setattr(module, name, 4 * MiB)

    found = measure("host", ""), measure("disk", str(tmp_path))

    assert [medium.name for medium in found] == ["measured", f"measured {tmp_path}"]
    assert all(medium.bytes_per_s > 1e6 and medium.latency_s >= 0 for medium in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.redis
def test_a_redis_server_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis, "QUICK_BYTES", 4 * MiB)

    with LocalRedis() as server:
        medium = measure("redis", server.url)

    assert medium.bytes_per_s > 1e6
    assert medium.latency_s >= 0


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        measure("disk", str(tmp_path / "nowhere"))
