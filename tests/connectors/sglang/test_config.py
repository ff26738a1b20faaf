from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.sglang.config import parse_backend_config
from connectors.sglang.start import check_storage
from connectors.sglang.versions import check_version
from kvstore.errors import ConfigError

DISK = {"path": "/tmp/pages", "capacity_bytes": "1GiB"}
SGLANGS = {"backend_name": "kvstore", "module_path": "connectors.sglang", "class_name": "KVStoreBackend"}


def test_sections_and_fields_are_taken_and_sglangs_own_keys_left_alone() -> None:
    config = parse_backend_config({**SGLANGS, "interface_v1": 1, "disk": DISK, "weights": "v1", "save_deadline_s": 3})

    assert config.store.disk.capacity_bytes == 1 << 30
    assert config.fields.weights == "v1"
    assert config.fields.save_deadline_s == 3


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "neither disk.path nor"),
        ({"disk": DISK, "disc": {}}, "unknown key 'disc'; did you mean 'disk'"),
        ({"disk": DISK, "host": {"capacity_bytes": "1GiB"}}, "set --hicache-size"),
        ({"disk": DISK, "service": {"url": "unix:///run/kv.sock"}}, "sglang_linker.KVStoreLinker"),
        ({"disk": DISK, "tp_lcm_size": 8}, "leave it out"),
        ({"disk": "/nvme"}, "disk is '/nvme'; it must be an object"),
        ({"disk": {**DISK, "policy": "s3fifo"}}, "disk.policy is 's3fifo'"),
        ({"disk": DISK, "store": {"block_size": 32}}, "use --page-size"),
        ({"disk": DISK, "weights": ""}, "weights is ''; it must be"),
        ({"disk": DISK, "save_deadline_s": "soon"}, "save_deadline_s is 'soon'; it must be a number"),
        ({"disk": {"path": "/tmp/pages", "capasity_bytes": 1}}, "capasity_bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_backend_config({**SGLANGS, **extra})

    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"should_split_heads": True, "tp_lcm_size": 8}, "tp_lcm_size is 8"),
        ({"extra_config": {"interface_v1": 0}}, "interface_v1 is 0"),
    ],
)
def test_what_sglang_asks_that_cannot_be_done_is_refused(given: dict[str, Any], words: str) -> None:
    storage = SimpleNamespace(**{"should_split_heads": False, "tp_lcm_size": None, "extra_config": {}} | given)

    with pytest.raises(ConfigError) as refused:
        check_storage(storage)

    assert words in str(refused.value)


def test_a_release_that_was_not_tried_is_refused_with_the_one_that_was() -> None:
    check_version("0.5.23")

    with pytest.raises(ConfigError) as refused:
        check_version("0.5.24")

    assert "Install sglang==0.5.23" in str(refused.value)
