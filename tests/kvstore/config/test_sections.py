from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvstore.config.reference import effective
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.units import GiB
from tests.helpers.configs import refusal

ROOT = Path(__file__).resolve().parents[3]
SECRET_URL = "redis://user:s3cret@cache.example:6380/1"

pytestmark = pytest.mark.usefixtures("nothing_configured")


def test_defaults_need_no_file_no_disk_and_no_server() -> None:
    config = Config.load()

    assert config.host.capacity_bytes == GiB
    assert config.disk.path is None
    assert config.redis.url is None
    assert {row.source for row in effective(config)} == {"default"}


def test_defaults_obey_their_own_bounds() -> None:
    defaults: dict[str, Any] = {row.field: row.value for row in effective(Config())}

    assert {row.field: row.value for row in effective(Config.load(**defaults))} == defaults


def test_constructor_reads_neither_file_nor_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvstore.toml").write_text("[store]\nblock_size = 16\n")
    monkeypatch.setenv("KVSTORE_STORE__BLOCK_SIZE", "32")

    config = Config(host={"ttl_s": 3})

    assert config.store.block_size == 64
    assert config.source("host.ttl_s") == "keyword argument"


def test_config_is_frozen_and_travels_between_processes() -> None:
    config = Config.load(**{"redis.url": SECRET_URL})

    with pytest.raises(ValidationError):
        config.host.ttl_s = 1.0
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.redis.url.reveal() == SECRET_URL


def test_probes_cannot_begin_after_their_longest_pause() -> None:
    overrides: dict[str, Any] = {"breaker.probe_after_s": "1min"}

    assert (
        refusal(**overrides)
        == "breaker.probe_max_s is 30.0 (from default); it must be at least probe_after_s, which is 1 min"
    )


def test_constructor_tells_bad_values_the_same_way() -> None:
    with pytest.raises(
        ConfigError, match=r"^host.capacity_bytes is 0 \(from keyword argument\); it must be at least 4096"
    ):
        Config(host={"capacity_bytes": 0})
    with pytest.raises(ConfigError, match=r"^bost \(from keyword argument\) is unknown; did you mean host\?"):
        Config(bost={})


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


def test_importing_the_configuration_loads_no_tier_library() -> None:
    code = "import sys, kvstore.config.sections; print(sorted({'redis', 'lmdb', 'torch', 'numpy'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
