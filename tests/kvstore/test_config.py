from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from eviction.registry import POLICIES
from kvstore import settings
from kvstore.config import Config, HostConfig, effective, markdown, variable
from kvstore.errors import ConfigError
from kvstore.secret import SecretUrl
from kvstore.units import GiB, MiB

ROOT = Path(__file__).resolve().parents[2]
SECRET_URL = "redis://user:s3cret@cache.example:6380/1"


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("KVSTORE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(path, **overrides)
    return str(caught.value)


def source_of(config: Config, field: str) -> str:
    return next(row.source for row in effective(config) if row.field == field)


# ---- sources --------------------------------------------------------------------------------------------------------


def test_defaults_need_no_file_no_disk_and_no_server() -> None:
    config = Config.load()

    assert config.host.capacity_bytes == GiB
    assert config.disk.path is None
    assert config.redis.url is None
    assert {row.source for row in effective(config)} == {"default"}


def test_defaults_obey_their_own_bounds() -> None:
    defaults: dict[str, Any] = {row.field: row.value for row in effective(Config())}

    assert {row.field: row.value for row in effective(Config.load(**defaults))} == defaults


def test_each_source_is_stronger_than_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path / "my.toml", '[host]\ncapacity_bytes = "2GiB"\nttl_s = 5\npolicy = "lru"\n[disk]\nworkers = 2\n'
    )
    monkeypatch.setenv("KVSTORE_HOST__TTL_S", "10min")
    monkeypatch.setenv("KVSTORE_DISK__WORKERS", "3")

    config = Config.load(file, disk={"workers": 8})

    assert (config.host.capacity_bytes, source_of(config, "host.capacity_bytes")) == (2 * GiB, str(file))
    assert (config.host.ttl_s, source_of(config, "host.ttl_s")) == (600.0, "environment KVSTORE_HOST__TTL_S")
    assert (config.disk.workers, source_of(config, "disk.workers")) == (8, "keyword argument")
    assert (config.store.block_size, source_of(config, "store.block_size")) == (64, "default")


def test_file_in_the_working_directory_is_found(tmp_path: Path) -> None:
    write(tmp_path / "kvstore.toml", "[store]\nblock_size = 16\n")

    config = Config.load()

    assert config.store.block_size == 16
    assert source_of(config, "store.block_size") == "kvstore.toml"


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


def test_constructor_reads_neither_file_nor_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "kvstore.toml", "[store]\nblock_size = 16\n")
    monkeypatch.setenv("KVSTORE_STORE__BLOCK_SIZE", "32")

    config = Config(host={"ttl_s": 3})

    assert config.store.block_size == 64
    assert source_of(config, "host.ttl_s") == "keyword argument"


@pytest.mark.parametrize("off", ["", "none", "off"])
def test_stronger_source_can_turn_a_tier_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    file = write(tmp_path / "f.toml", f'[disk]\npath = "/data"\n[redis]\nurl = "{SECRET_URL}"\n')
    monkeypatch.setenv("KVSTORE_DISK__PATH", off)

    config = Config.load(file, redis={"url": off})

    assert config.disk.path is None
    assert config.redis.url is None


def test_environment_names_may_be_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("kvstore_store__block_size", "128")

    config = Config.load()

    assert config.store.block_size == 128
    assert source_of(config, "store.block_size") == "environment kvstore_store__block_size"


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
        if path.name not in ("config.py", "settings.py"):
            read.update(re.findall(r'"(KVSTORE_(?!\w*__)[A-Z_]*[A-Z])"', path.read_text()))
    for name in read:
        monkeypatch.setenv(name, "x")

    assert "KVSTORE_REDIS_SERVER" in read
    assert Config.load() == Config()


def test_config_is_frozen_and_travels_between_processes() -> None:
    config = Config.load(**{"redis.url": SECRET_URL})

    with pytest.raises(ValidationError):
        config.host.ttl_s = 1.0
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.redis.url.reveal() == SECRET_URL


# ---- what is wrong is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("store.block_size", 0, "store.block_size is 0 \\(from keyword argument\\); it must be at least 1"),
        ("store.block_size", "x", "store.block_size is 'x' .*; it must be a valid integer"),
        ("store.block_size", 1.5, "store.block_size is 1.5 .*; it must be a valid integer"),
        ("store.block_size", True, "store.block_size is True .*; it must be a number"),
        ("store.hash", "md5", "store.hash is 'md5' .*; it must be 'sha256' or 'xxh3_128'"),
        ("store.load_or_recompute", "maybe", "'maybe' .*; it must be true or false"),
        ("store.load_deadline_s", "inf", "store.load_deadline_s is 'inf'"),
        ("store.load_deadline_s", 0, "it must be more than 0 s"),
        ("store.max_dirty_fraction", 1.5, "it must be at most 1"),
        ("host.capacity_bytes", 0, "host.capacity_bytes is 0 .*; it must be at least 4096 bytes"),
        ("host.capacity_bytes", "1 GigB", "'1 GigB' .*; a size is .*\"512MiB\""),
        ("host.policy", "fifo2", "host.policy is 'fifo2' .*; it must be one of .*lru"),
        ("host.ttl_s", -1, "host.ttl_s is -1 .*; it must be at least 0 s"),
        ("host.ttl_s", "nan", "host.ttl_s is 'nan'"),
        ("disk.capacity_bytes", 0, "disk.capacity_bytes is 0 .*at least 4096 bytes"),
        ("disk.admit", "never", "it must be 'always' or 'second_use'"),
        ("disk.workers", 0, "disk.workers is 0 .*at least 1"),
        ("redis.connections", 1000, "it must be at most 64"),
        ("redis.prefix", "a b", "it must be 1 to 64 printable ASCII characters, without spaces and braces"),
        ("redis.prefix", "{a}", "without spaces and braces"),
        ("redis.ttl_s", 0, "it must be more than 0 s"),
        (
            "redis.url",
            "redi://h",
            "redis.url is 'redi://h' .*; it has the unknown scheme 'redi'; did you mean redis://[?]",
        ),
        ("redis.url", 6379, "it must be text such as redis://"),
        ("breaker.probe_after_s", "5 m", "'5 m' .*; a time is .*\"5min\""),
    ],
)
def test_bad_value_is_told_with_field_value_source_and_remedy(field: str, value: object, told: str) -> None:
    overrides: dict[str, Any] = {field: value}
    message = refusal(**overrides)

    assert message.startswith(f"{field} is ")
    assert re.search(told, message)


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


def test_probes_cannot_begin_after_their_longest_pause() -> None:
    overrides: dict[str, Any] = {"breaker.probe_after_s": "1min"}

    assert (
        refusal(**overrides)
        == "breaker.probe_max_s is 30.0 (from default); it must be at least probe_after_s, which is 1 min"
    )


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

    monkeypatch.setattr(settings, "TomlConfigSettingsSource", denied)

    assert refusal(file) == f"configuration file {file} (the path given) cannot be read: Permission denied"


def test_value_in_place_of_a_section_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", "host = 5\n")

    assert refusal(file) == f"host is 5 (from {file}); it is a section with fields such as host.capacity_bytes"


def test_constructor_tells_bad_values_the_same_way() -> None:
    with pytest.raises(
        ConfigError, match=r"^host.capacity_bytes is 0 \(from keyword argument\); it must be at least 4096"
    ):
        Config(host={"capacity_bytes": 0})
    with pytest.raises(ConfigError, match=r"^bost \(from keyword argument\) is unknown; did you mean host\?"):
        Config(bost={})


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_password_is_in_no_print_of_a_configuration() -> None:
    config = Config.load(**{"redis.url": SECRET_URL})

    shown = [repr(config), str(config), f"{config.redis.url}", config.model_dump_json(), repr(config.model_dump())]
    shown += [f"{row.text} {row.json_value}" for row in effective(config)]

    assert not [text for text in shown if "s3cret" in text]
    assert "redis://user:***@cache.example:6380/1" in shown[0]
    assert config.redis.url is not None
    assert config.redis.url.reveal() == SECRET_URL


@pytest.mark.parametrize(
    "url",
    [
        "redi://:s3cret@h",
        "redis//:s3cret@h",
        "redis:/:s3cret@h",
        "user:s3cret@h",
        "redis://:a/s3cret@h",
        "redis://:a@s3cret@h:x",
        "redis://h/0?password=s3cret&x=1",
        "unix://u:s3cret@",
        "rediss+sentinel://u:s3cret@h?sentinel_password=s3cret",
    ],
)
def test_password_is_not_in_the_refusal_of_a_mistyped_url(url: str) -> None:
    for overrides in ({"redis.url": url}, {"redis": url}):
        with pytest.raises(ConfigError) as caught:
            Config.load(**overrides)

        # As a program prints it: the library's own error, which quotes its input, is not chained to ours.
        assert "s3cret" not in "".join(traceback.format_exception(caught.type, caught.value, caught.tb))


@pytest.mark.parametrize(
    "url",
    ["redis://h", "rediss://u:p@h:1/2", "unix:///run/r.sock", "redis+cluster://a:1,b:2", "redis+sentinel://h/main/0"],
)
def test_urls_of_every_kind_of_server_are_taken(url: str) -> None:
    assert Config.load(**{"redis.url": url}).redis.url == SecretUrl(url)


# ---- printing -------------------------------------------------------------------------------------------------------


def test_effective_lists_every_field_once_with_unit_and_description() -> None:
    rows = effective(
        Config.load(host={"capacity_bytes": "1.5GiB"}, disk={"path": "/data"}, store={"touch_interval_s": 90})
    )
    text = {row.field: row.text for row in rows}

    assert len(text) == len(rows) > 30
    assert text["host.capacity_bytes"] == "1.5 GiB"
    assert text["store.touch_interval_s"] == "1.5 min"
    assert text["disk.path"] == "/data"
    assert text["host.huge_pages"] == "true"
    assert [row.field for row in rows if not row.description.endswith(".")] == []


def test_every_field_can_be_set_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = effective(Config())
    for row in rows:
        monkeypatch.setenv(variable(row.field), "none" if row.value is None else str(row.value))

    loaded = effective(Config.load())

    assert [row.value for row in loaded] == [row.value for row in rows]
    assert [row.source for row in loaded] == [f"environment {variable(row.field)}" for row in rows]


def test_reference_names_every_field_with_its_bounds_and_choices() -> None:
    text = markdown()

    assert all(f"| `{row.field.partition('.')[2]}` |" in text for row in effective(Config()))
    assert "| `capacity_bytes` | 1 GiB | ≥ 4 KiB |" in text
    assert "| `load_deadline_s` | 2 s | > 0 s, ≤ 10 min |" in text
    assert all(f"`{policy}`" in text for policy in POLICIES)


def test_written_documentation_is_the_reference_of_today() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()

    assert markdown().strip() in page, "run: kvstore config --markdown, and put it into docs/configuration.md"


def test_importing_the_configuration_loads_no_tier_library() -> None:
    code = "import sys, kvstore.config; print(sorted({'redis', 'lmdb', 'torch', 'numpy'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
