"""What the start asks of a store before any request: a Redis server or a daemon that is not there is told now."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.vllm.config import parse_extra_config
from connectors.vllm.start import check_servers, check_service, warn_of_hash
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.opening import open_configured
from kvstore.ports import free_port
from tests.helpers.daemons import local_daemon
from tests.helpers.stores import BLOCK, LAYOUT, namespace, open_small


def test_a_redis_server_that_does_not_answer_is_refused_unless_that_is_allowed() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    with open_small(redis_url=url) as store:
        with pytest.raises(ConfigError, match=r"redis\.url: the server does not answer"):
            check_servers(store, parse_extra_config({"redis": {"url": url}}, "kv_both"), BLOCK)

        check_servers(store, parse_extra_config({"redis": {"url": url}, "require_redis": False}, "kv_both"), BLOCK)


def test_a_daemon_that_does_not_answer_is_refused_unless_that_is_allowed(tmp_path: Path) -> None:
    url = f"unix://{tmp_path / 'kv.sock'}"
    wanted: dict[str, Any] = {"service": {"url": url}}
    store = open_configured(Config(**wanted), LAYOUT, namespace())

    with pytest.raises(ConfigError, match=r"no daemon answers there; start it \(kvstore serve\)"):
        check_service(store, parse_extra_config(wanted, "kv_both"))

    check_service(store, parse_extra_config({**wanted, "require_daemon": False}, "kv_both"))
    store.close()


def test_a_daemon_that_answers_is_accepted(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"service": {"url": f"unix://{tmp_path / 'kv.sock'}"}}
    with local_daemon(tmp_path / "kv.sock"):
        store = open_configured(Config(**wanted), LAYOUT, namespace())

        check_service(store, parse_extra_config(wanted, "kv_both"))
        store.close()


@pytest.mark.parametrize(
    ("name", "seed", "extra", "is_warned_of"),
    [
        ("xxhash", None, {"redis": {"url": "redis://cache:6379"}}, True),
        ("xxhash_cbor", None, {"disk": {"path": "/var/cache/kv"}}, True),
        ("xxhash", "7", {"redis": {"url": "redis://cache:6379"}}, False),
        ("xxhash", None, {}, False),
        ("sha256", None, {"redis": {"url": "redis://cache:6379"}}, False),
    ],
)
def test_hashes_that_no_other_process_makes_are_warned_of(
    name: str,
    seed: str | None,
    extra: dict[str, Any],
    is_warned_of: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo=name))

    with caplog.at_level(logging.WARNING, "vllm.kvstore"):
        warn_of_hash(vllm_config, parse_extra_config(extra, "kv_both"))

    assert ("set PYTHONHASHSEED" in caplog.text) == is_warned_of
