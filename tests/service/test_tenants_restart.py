"""After a restart each tenant finds its own pages on disk, and none of the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.testing.redis_server import free_port
from tests.helpers.daemons import DaemonProcess, Http, attach
from tests.helpers.stores import LAYOUT, load, namespace, prompt, use
from tests.helpers.waiting import wait_until

BLUE, RED = "blue-token-0123456789", "red-token-0123456789"
TENANTS = f"""
[[tenant]]
name = "blue"
token = "{BLUE}"

[[tenant]]
name = "red"
token = "{RED}"
"""


def test_each_tenant_finds_its_own_pages_again_and_none_of_the_others(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TENANTS)
    tokens.chmod(0o600)
    port = free_port()
    settings = (
        f"service.http_port={port}",
        f"service.tokens_file={tokens}",
        "service.max_namespaces=2",
        "store.load_or_recompute=false",
    )
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk", *settings)
    try:
        with _tenant(port, BLUE) as blue, _tenant(port, RED) as red, attach(daemon.socket) as local:
            use(blue, prompt(6, seed=1))
            use(blue, prompt(4, seed=3))
            use(red, prompt(5, seed=2))
            use(red, prompt(3, seed=3))
            use(local, prompt(7, seed=4))
            with _tenant(port, BLUE, revision="2") as other:
                use(other, prompt(2, seed=1))

        assert daemon.terminate() == 0
        daemon.start()
        assert {len(Http(port, token).get("/v1/namespaces")["namespaces"]) for token in (BLUE, RED)} == {1, 2}

        found = {"blue": {1: 6, 3: 4}, "red": {2: 5, 3: 3}, "local": {4: 7}, "blue 2": {1: 2}}
        with (
            _tenant(port, BLUE) as blue,
            _tenant(port, RED) as red,
            _tenant(port, BLUE, revision="2") as other,
            attach(daemon.socket) as local,
        ):
            for name, store in {"blue": blue, "red": red, "local": local, "blue 2": other}.items():
                for seed in (1, 2, 3, 4):
                    request = store.request(prompt(7, seed))
                    expected = found[name].get(seed, 0)
                    assert store.wait_lookup(request, 5.0).num_blocks == expected, (name, seed)
                    loaded, match = load(store, request)
                    assert loaded == expected
                    assert set(match.by_tier) <= {"disk"}
    finally:
        daemon.kill()


def test_a_tenant_that_is_no_longer_in_the_file_is_left_on_disk_for_its_return(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TENANTS)
    tokens.chmod(0o600)
    port = free_port()
    settings = (f"service.http_port={port}", f"service.tokens_file={tokens}")
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk", *settings)
    try:
        with _tenant(port, RED) as red:
            use(red, prompt(5))
        assert daemon.terminate() == 0
        tokens.write_text(TENANTS.split("\n\n")[0])
        daemon.start()
        assert Http(port, RED).call("GET", "/v1/namespaces")[0] == 401
        assert Http(port, BLUE).get("/v1/namespaces")["namespaces"] == []

        assert daemon.terminate() == 0
        tokens.write_text(TENANTS)
        daemon.start()

        with _tenant(port, RED) as red:
            wait_until(lambda: red.wait_lookup(red.request(prompt(5))).num_blocks == 5)
    finally:
        daemon.kill()


def _tenant(port: int, token: str, **changes: Any) -> RemoteStore:
    return connect(f"http://127.0.0.1:{port}", LAYOUT, namespace(**changes), token=token, staging_bytes=1 << 20)
