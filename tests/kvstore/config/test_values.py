from __future__ import annotations

import re
from typing import Any

import pytest

from kvstore.config.secret import SecretUrl
from kvstore.config.sections import Config
from tests.helpers.configs import refusal

pytestmark = pytest.mark.usefixtures("nothing_configured")


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
        ("disk.admit", "never", "it must be 'always', 'second_use' or 'predicted'"),
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
    "url",
    ["redis://h", "rediss://u:p@h:1/2", "unix:///run/r.sock", "redis+cluster://a:1,b:2", "redis+sentinel://h/main/0"],
)
def test_urls_of_every_kind_of_server_are_taken(url: str) -> None:
    assert Config.load(**{"redis.url": url}).redis.url == SecretUrl(url)
