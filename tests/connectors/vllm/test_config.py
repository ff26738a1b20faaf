"""The connector's part of vLLM's configuration: what is wrong is refused before the engine starts."""

from __future__ import annotations

from typing import Any

import pytest

from connectors.vllm.config import parse_extra_config
from connectors.vllm.versions import check_version
from kvstore.errors import ConfigError


def test_an_empty_configuration_is_a_cache_in_host_memory() -> None:
    config = parse_extra_config({}, "kv_both")

    assert (config.loads, config.saves) == (True, True)
    assert config.fields.load == "auto"
    assert config.store.disk.path is None


def test_sections_are_those_of_the_store(tmp_path: Any) -> None:
    config = parse_extra_config({"disk": {"path": str(tmp_path)}, "host.capacity_bytes": "64MiB"}, "kv_both")

    assert config.store.disk.path == tmp_path
    assert config.store.host.capacity_bytes == 64 << 20


@pytest.mark.parametrize(
    ("role", "loads", "saves"), [("kv_both", True, True), ("kv_producer", False, True), ("kv_consumer", True, False)]
)
def test_the_role_says_what_is_done(tmp_path: Any, role: str, loads: bool, saves: bool) -> None:
    config = parse_extra_config({"disk": {"path": str(tmp_path)}}, role)

    assert (config.loads, config.saves) == (loads, saves)


@pytest.mark.parametrize(
    ("extra", "role", "message"),
    [
        ({"disc": {}}, "kv_both", "unknown key 'disc'; did you mean 'disk'"),
        ({"path": "/tmp"}, "kv_both", "unknown key 'path'"),
        ({"host": {"capacity": 1}}, "kv_both", "host.capacity"),
        ({"host": "1GiB"}, "kv_both", "host is '1GiB'; it must be an object"),
        ({"load": "later"}, "kv_both", "load is 'later'; it must be one of auto, async, sync"),
        ({"save": True}, "kv_both", "save is True; it must be one of"),
        ({"min_load_tokens": -1}, "kv_both", "min_load_tokens is -1"),
        ({"weights": ""}, "kv_both", "weights is ''"),
        ({"without_prefix_caching": "yes"}, "kv_both", "without_prefix_caching is 'yes'"),
        ({"store": {"hash": "xxh3_128"}}, "kv_both", "must be 'sha256'"),
        ({"store": {"block_size": 16}}, "kv_both", "--block-size"),
        ({"redis": {"url": "reddis://host"}}, "kv_both", "redis.url"),
        ({}, None, "kv_role is None"),
        ({}, "kv_consumer", "make no sense without disk.path, redis.url or service.url"),
        ({}, "kv_producer", "make no sense without disk.path, redis.url or service.url"),
        ({"save": "none"}, "kv_both", "make no sense without"),
        ({"service": {"url": "http://host:8470"}}, "kv_both", "machines share by Redis: write unix:///path/of/socket"),
        ({"service": {"url": "unix:///kv.sock"}, "disk": {"path": "/d"}}, "kv_both", "'disk' is given beside service"),
        ({"service": {"url": "unix:///kv.sock"}, "host.ttl_s": 5}, "kv_both", "'host.ttl_s' is given beside service"),
    ],
)
def test_what_cannot_work_is_refused(extra: dict[str, Any], role: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_extra_config(extra, role)


def test_a_role_that_neither_loads_nor_saves_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="neither load nor save"):
        parse_extra_config({"disk": {"path": str(tmp_path)}, "save": "none"}, "kv_producer")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.32.1+cpu", "0.33.0", "0.33.0+cpu"])
def test_tested_versions_are_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.3.2"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"vLLM {version} is not supported.*0\.32\.x and 0\.33\.x"):
        check_version(version)
