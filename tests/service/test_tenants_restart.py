"""After a restart each tenant finds its own pages on disk, and none of the others'."""

from __future__ import annotations

from pathlib import Path

from kvstore.ports import free_port
from tests.helpers.daemons import DaemonProcess, Http, attach
from tests.helpers.http_pages import HttpPages
from tests.helpers.stores import load, namespace, prompt, use
from tests.helpers.waiting import wait_until

BLUE, RED = "blue-token-0123456789", "red-token-0123456789"
SECOND = namespace(revision="2")
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
        blue, red, other = HttpPages(port, BLUE), HttpPages(port, RED), HttpPages(port, BLUE, names=SECOND)
        blue.save(prompt(6, seed=1))
        blue.save(prompt(4, seed=3))
        red.save(prompt(5, seed=2))
        red.save(prompt(3, seed=3))
        other.save(prompt(2, seed=1))
        with attach(daemon.socket) as local:
            use(local, prompt(7, seed=4))

        assert daemon.terminate() == 0
        daemon.start()
        assert {len(Http(port, token).get("/v1/namespaces")["namespaces"]) for token in (BLUE, RED)} == {1, 2}

        found = {"blue": {1: 6, 3: 4}, "red": {2: 5, 3: 3}, "blue 2": {1: 2}}
        for name, tenant in {"blue": blue, "red": red, "blue 2": other}.items():
            for seed in (1, 2, 3, 4):
                expected = found[name].get(seed, 0)
                told = tenant.lookup(prompt(7, seed))
                assert (told["num_blocks"], set(told["by_tier"]) <= {"disk"}) == (expected, True), (name, seed)
                assert tenant.load(prompt(7, seed)) == expected
        with attach(daemon.socket) as local:
            for seed, expected in ((1, 0), (4, 7)):
                assert load(local, local.request(prompt(7, seed)))[0] == expected
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
        red = HttpPages(port, RED)
        red.save(prompt(5))
        assert daemon.terminate() == 0
        tokens.write_text(TENANTS.split("\n\n")[0])
        daemon.start()
        assert Http(port, RED).call("GET", "/v1/namespaces")[0] == 401
        assert Http(port, BLUE).get("/v1/namespaces")["namespaces"] == []

        assert daemon.terminate() == 0
        tokens.write_text(TENANTS)
        daemon.start()

        wait_until(lambda: red.lookup(prompt(5))["num_blocks"] == 5)
    finally:
        daemon.kill()
