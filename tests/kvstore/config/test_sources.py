from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.config.sections import Config, HostConfig
from kvstore.errors import ConfigError
from kvstore.units import GiB, MiB
from tests.helpers.configs import refusal

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("nothing_configured")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_each_source_is_stronger_than_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path / "my.toml", '[host]\ncapacity_bytes = "2GiB"\nttl_s = 5\npolicy = "lru"\n[disk]\nworkers = 2\n'
    )
    monkeypatch.setenv("KVSTORE_HOST__TTL_S", "10min")
    monkeypatch.setenv("KVSTORE_DISK__WORKERS", "3")

    config = Config.load(file, disk={"workers": 8})

    assert (config.host.capacity_bytes, config.source("host.capacity_bytes")) == (2 * GiB, str(file))
    assert (config.host.ttl_s, config.source("host.ttl_s")) == (600.0, "environment KVSTORE_HOST__TTL_S")
    assert (config.disk.workers, config.source("disk.workers")) == (8, "keyword argument")
    assert (config.store.block_size, config.source("store.block_size")) == (64, "default")


def test_file_in_the_working_directory_is_found(tmp_path: Path) -> None:
    write(tmp_path / "kvstore.toml", "[store]\nblock_size = 16\n")

    config = Config.load()

    assert config.store.block_size == 16
    assert config.source("store.block_size") == "kvstore.toml"


def test_file_named_by_the_environment_comes_before_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "kvstore.toml", "[store]\nblock_size = 16\n")
    monkeypatch.setenv("KVSTORE_CONFIG", str(write(tmp_path / "other.toml", "[store]\nblock_size = 32\n")))

    assert Config.load().store.block_size == 32


def test_path_given_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_CONFIG", str(tmp_path / "not-there.toml"))

    assert Config.load(write(tmp_path / "mine.toml", "[store]\nblock_size = 8\n")).store.block_size == 8


def test_dotted_and_nested_keywords_mean_the_same() -> None:
    overrides: dict[str, Any] = {"host.capacity_bytes": "64MiB", "host.ttl_s": 1}
    dotted = Config.load(**overrides)
    nested = Config.load(host={"capacity_bytes": 64 * MiB, "ttl_s": 1})

    assert dotted.host == nested.host == HostConfig(capacity_bytes=64 * MiB, ttl_s=1)


def test_section_object_overrides_only_what_it_sets(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", "[host]\nttl_s = 7\n")

    config = Config.load(file, host=HostConfig(capacity_bytes=64 * MiB))

    assert (config.host.capacity_bytes, config.host.ttl_s) == (64 * MiB, 7.0)


@pytest.mark.parametrize("off", ["", "none", "off"])
def test_stronger_source_can_turn_a_tier_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    file = write(tmp_path / "f.toml", '[disk]\npath = "/data"\n[redis]\nurl = "redis://cache.example:6380/1"\n')
    monkeypatch.setenv("KVSTORE_DISK__PATH", off)

    config = Config.load(file, redis={"url": off})

    assert config.disk.path is None
    assert config.redis.url is None


def test_environment_names_may_be_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("kvstore_store__block_size", "128")

    config = Config.load()

    assert config.store.block_size == 128
    assert config.source("store.block_size") == "environment kvstore_store__block_size"


def test_variables_that_kubernetes_makes_for_services_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "KVSTORE_PORT",
        "KVSTORE_SERVICE_HOST",
        "KVSTORE_REDIS_PORT_6379_TCP_ADDR",
        "KVSTORE_SERVICE_PORT_HTTP",
    ):
        monkeypatch.setenv(name, "tcp://10.0.0.1:6379")

    assert Config.load() == Config()


def test_variables_that_other_modules_read_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        path for package in ("radix", "eviction", "kvstore", "connectors") for path in (ROOT / package).rglob("*.py")
    ]
    read: set[str] = set()
    for path in sources:
        if path.name not in ("sections.py", "sources.py"):
            read.update(re.findall(r'"(KVSTORE_(?!\w*__)[A-Z_]*[A-Z])"', path.read_text()))
    for name in read:
        monkeypatch.setenv(name, "x")

    assert "KVSTORE_REDIS_SERVER" in read
    assert Config.load() == Config()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("host.capacty_bytes", "did you mean host.capacity_bytes?"),
        ("block_size", "did you mean store.block_size?"),
        ("disk.zzz", "known are disk.path, disk.capacity_bytes"),
        ("zzz", "known are store, host, disk, redis, breaker"),
    ],
)
def test_unknown_keyword_is_told_with_what_was_meant(name: str, hint: str) -> None:
    overrides: dict[str, Any] = {name: 1}
    assert refusal(**overrides).startswith(f"{name} (from keyword argument) is unknown; {hint}")


def test_unknown_section_is_told_once() -> None:
    assert refusal(hots={"ttl_s": 1, "policy": "lru"}) == "hots (from keyword argument) is unknown; did you mean host?"


def test_unknown_names_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", "[host]\ncapacity = 1\n[bost]\nx = 1\n[hot]\n")

    lines = refusal(file).splitlines()

    assert lines[0].startswith(f"host.capacity (from {file}) is unknown; did you mean host.capacity_bytes?")
    assert lines[1].startswith(f"bost (from {file}) is unknown; did you mean")
    assert lines[2].startswith(f"hot (from {file}) is unknown; did you mean host?")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("KVSTORE_HOST_CAPACITY_BYTES", "did you mean KVSTORE_HOST__CAPACITY_BYTES?"),
        ("KVSTORE_HOST__CAPACITY", "did you mean KVSTORE_HOST__CAPACITY_BYTES?"),
        ("KVSTORE_CONFG", "is unknown"),
        ("KVSTORE_HOST", "is unknown"),
    ],
)
def test_unknown_variable_with_our_prefix_is_refused(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")

    message = refusal()

    assert message.startswith(f"environment variable {name} is unknown")
    assert hint in message


def test_bad_variable_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_STORE__BLOCK_SIZE", "0")

    assert refusal() == "store.block_size is '0' (from environment KVSTORE_STORE__BLOCK_SIZE); it must be at least 1"


def test_all_bad_values_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", '[host]\nttl_s = -1\npolicy = "x"\n[store]\nblock_size = 0\n')

    assert [line.split()[0] for line in refusal(file).splitlines()] == ["store.block_size", "host.policy", "host.ttl_s"]


def test_unknown_names_of_all_sources_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "f.toml", "[bost]\n")
    monkeypatch.setenv("KVSTORE_CONFG", "x")

    assert [line.split()[0] for line in refusal(file, zzz=1).splitlines()] == ["bost", "environment", "zzz"]


def test_malformed_toml_is_told_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", '[host]\nttl_s = 1\npolicy = "lru\n')

    message = refusal(file)

    assert f"configuration file {file} (the path given) is not valid TOML" in message
    assert "line 3" in message


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_bytes(b"\xff\xfe\x00")

    assert "is not valid TOML" in refusal(tmp_path / "f.toml")


def test_missing_file_is_an_error_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "no.toml"
    assert (
        refusal(missing)
        == f"configuration file {missing} (the path given) does not exist; give the path of a TOML file"
    )

    monkeypatch.setenv("KVSTORE_CONFIG", str(missing))
    assert f"{missing} (environment KVSTORE_CONFIG) does not exist" in refusal()


def test_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "is not a file" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", "")
    file.chmod(0)

    assert "cannot be read: Permission denied" in refusal(file)


def test_file_that_fails_while_being_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "f.toml", "")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_text", denied)

    assert refusal(file) == f"configuration file {file} (the path given) cannot be read: Permission denied"


def test_value_in_place_of_a_section_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", "host = 5\n")

    assert refusal(file) == f"host is 5 (from {file}); it is a section with fields such as host.capacity_bytes"


@pytest.mark.parametrize(
    "field",
    [
        "service.url=http://kv:hunter2@host:1",
        "service.socket_url=http://kv:hunter2@host:1",
        "redis.url=redis://kv:hunter2@host:notaport",
        "host.capacity_bytes=redis://kv:hunter2@host",
        "service=hunter2",
        "redis=redis://:hunter2@host",
    ],
)
def test_no_message_about_a_wrong_value_shows_a_password(field: str) -> None:
    name, _, value = field.partition("=")

    with pytest.raises(ConfigError) as told:
        Config.load(None, **{name: value})

    assert "hunter2" not in str(told.value)


def test_a_token_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text('[service]\ntoken = ["hunter2"]\n')

    with pytest.raises(ConfigError, match=r"service\.token is \*\*\*") as told:
        Config.load(tmp_path / "kv.toml")

    assert "hunter2" not in str(told.value)


def test_a_setting_that_is_no_more_is_told_with_what_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kv.toml").write_text('[service]\nstaging_bytes = "256MiB"\n')
    told = r"staging_bytes.* is unknown; it belonged to .*machines share by Redis: redis\.url.*leave it out"

    with pytest.raises(ConfigError, match=told):
        Config.load(tmp_path / "kv.toml")

    monkeypatch.setenv("KVSTORE_SERVICE__STAGING_BYTES", "256MiB")
    with pytest.raises(ConfigError, match=told.replace("staging_bytes", "STAGING_BYTES")):
        Config.load()
