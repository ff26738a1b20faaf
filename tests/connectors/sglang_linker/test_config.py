from __future__ import annotations

from typing import Any

import pytest

from connectors.sglang_linker.config import parse_linker_config
from kvstore.errors import ConfigError

HOST = {"capacity_bytes": "1GiB"}


def test_sections_and_fields_are_taken() -> None:
    config = parse_linker_config({"host": HOST, "disk.path": "/tmp/pages", "weights": "v1", "adapters_by_name": True})

    assert config.store.host.capacity_bytes == 1 << 30
    assert str(config.store.disk.path) == "/tmp/pages"
    assert config.fields.weights == "v1"
    assert config.fields.adapters_by_name


def test_nothing_given_is_host_memory_alone() -> None:
    assert not parse_linker_config({}).store.tiers()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hosts": HOST}, "linker_extra_config: unknown key 'hosts'; did you mean 'host'"),
        ({"zzz": 1}, "unknown key 'zzz'; known are store, host, disk, redis"),
        ({"host": "1GiB"}, "host is '1GiB'; it must be an object of fields"),
        ({"host": {"capacity_byte": 1}}, "capacity_byte"),
        ({"weights": 3}, "weights is 3; it must be 'sampled', 'full' or a name"),
        ({"adapters_by_name": "yes"}, "adapters_by_name is 'yes'; it must be true or false"),
        ({"store": {"block_size": 16}}, "store.block_size is given; with SGLang it is SGLang's own: use --page-size"),
        ({"store": {"hash": "xxh3_128"}}, "store.hash is 'xxh3_128'; SGLang's own page hashes need 'sha256'"),
        ({"store": {"single_flight": True}}, "store.single_flight is true; SGLang's linker has no answer"),
        (
            {"service": {"url": "unix:///tmp/kv.sock"}, "disk.path": "/tmp/kv"},
            "'disk.path' is given beside service.url",
        ),
        ([], "linker_extra_config is []; it must be an object of sections"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_linker_config(given)

    assert message in str(caught.value)
