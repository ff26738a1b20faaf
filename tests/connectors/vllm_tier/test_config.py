from __future__ import annotations

from typing import Any

import pytest

from connectors.vllm_tier.config import parse_tier_config
from kvstore.errors import ConfigError

DISK = {"path": "/tmp/pages", "capacity_bytes": "1GiB"}


def test_sections_and_fields_are_taken() -> None:
    config = parse_tier_config({"disk": DISK, "redis": {"url": "redis://h:1"}, "close_timeout_s": 3, "weights": "v1"})

    assert config.store.disk.capacity_bytes == 1 << 30
    assert config.fields.close_timeout_s == 3
    assert config.fields.weights == "v1"


def test_dotted_keys_are_sections_too() -> None:
    assert str(parse_tier_config({"disk.path": "/tmp/pages"}).store.disk.path) == "/tmp/pages"


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_DISK__PATH", "/tmp/from-environment")

    assert str(parse_tier_config({}).store.disk.path) == "/tmp/from-environment"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither disk.path nor redis.url"),
        ({"disks": DISK}, "unknown key 'disks'; did you mean 'disk'"),
        ({"zzz": 1, "disk": DISK}, "known are store, disk, redis"),
        ({"host": {"capacity_bytes": "1GiB"}, "disk": DISK}, "cpu_bytes_to_use"),
        ({"disk": "/tmp/pages"}, "disk is '/tmp/pages'; it must be an object"),
        ({"disk": {**DISK, "capacty_bytes": 1}}, "capacty_bytes"),
        ({"disk": {**DISK, "policy": "sieve"}}, "disk.policy is 'sieve'"),
        ({"disk": {**DISK, "admit": "second_use"}}, "disk.admit is 'second_use'"),
        ({"disk": DISK, "redis": {"admit": "second_use"}}, "redis.admit is 'second_use'"),
        ({"disk": DISK, "store": {"hash": "xxh3_128"}}, "store.hash is 'xxh3_128'"),
        ({"disk": DISK, "store": {"block_size": 16}}, "use --block-size"),
        ({"disk": DISK, "weights": ""}, "weights is ''"),
        ({"disk": DISK, "adapters_by_name": "yes"}, "adapters_by_name is 'yes'; it must be true or false"),
        ({"disk": DISK, "locality": "NEAR"}, "locality is 'NEAR'; it must be 'LOCAL' or 'REMOTE'"),
        ({"disk": DISK, "close_timeout_s": True}, "close_timeout_s is True"),
        ({"disk": DISK, "close_timeout_s": -1}, "close_timeout_s is -1"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tier_config(given)

    assert message in str(caught.value)
