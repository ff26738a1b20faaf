"""Who is let in to the HTTP API, under which names and over which connections, and what a tenant sees of others."""

import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from kvstore.config.sections import Config
from kvstore.errors import ConfigError, TierUnavailable
from kvstore.service.dashboard.client import DashboardClient
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.http_pages import HttpPages
from tests.helpers.stores import PAGE_BYTES, prompt, save
from tests.helpers.waiting import WAIT_S

BLUE, RED = "blue-token-0123456789", "red-token-0123456789"
TENANTS = f"""
[[tenant]]
name = "blue"
token = "{BLUE}"
host_bytes = {32 * PAGE_BYTES}
disk_bytes = {16 * PAGE_BYTES}
operator = true

[[tenant]]
name = "red"
token = "{RED}"
disk_bytes = 0
"""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[LocalDaemon]:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TENANTS)
    tokens.chmod(0o600)
    sections = {"service": {"http_port": 0, "tokens_file": tokens}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        yield daemon
        daemon.look(lambda d: [opened.store.check() for opened in d.stores.all()])


def test_tenants_see_neither_each_others_pages_nor_numbers(shared: LocalDaemon) -> None:
    port = shared.daemon.app.port
    blue, red = HttpPages(port, BLUE), HttpPages(port, RED)
    blue.save(prompt(5))

    assert blue.load(prompt(5)) == 5
    assert red.load(prompt(5)) == 0
    assert blue.lookup(prompt(5))["num_blocks"] == 5
    assert red.lookup(prompt(5))["num_blocks"] == 0
    assert red.stats()["saved_pages"] == 0
    metrics = Http(port, RED).get("/metrics").decode()
    assert 'tenant="red"' in metrics
    assert "blue" not in metrics
    assert "kvstore_service" not in metrics
    assert 'tenant="red"' in Http(port, BLUE).get("/metrics").decode()


def test_a_tenants_quota_is_its_stores_size(shared: LocalDaemon) -> None:
    port = shared.daemon.app.port
    blue, red = HttpPages(port, BLUE), HttpPages(port, RED)
    assert blue.stats()["capacity_pages"] == {"host": 32, "disk": 16}
    assert red.stats()["capacity_pages"] == {"host": 64}
    red.save(prompt(20))
    for seed in range(8):
        blue.save(prompt(20, seed))

    assert red.load(prompt(20)) == 20
    assert blue.stats()["pages"]["host"] <= 32


def test_a_tenant_cannot_find_what_the_socket_stored(shared: LocalDaemon, tmp_path: Path) -> None:
    with attach(tmp_path / "kv.sock") as local:
        save(local, local.request(prompt(5)))
        keys = [key.hex() for key in local.request(prompt(5)).keys]
        blue = HttpPages(shared.daemon.app.port, BLUE)

        assert blue.http.post("/v1/lookup", keys=keys, namespace=blue.namespace)["num_blocks"] == 0


@pytest.mark.parametrize("path", ["/v1/stats", "/v1/namespaces", "/metrics", "/v1/tiers", "/v1/events"])
def test_a_wrong_token_learns_nothing(shared: LocalDaemon, path: str) -> None:
    port = shared.daemon.app.port

    answers = [Http(port, token).call("GET", path) for token in (None, "wrong", BLUE[:-1], BLUE + "x", "ü")]

    assert {status for status, _ in answers} == {401}
    assert len({str(body) for _, body in answers}) == 1
    assert Http(port).get("/healthz") == {"status": "ok"}


def test_only_operators_change_tiers(shared: LocalDaemon) -> None:
    port = shared.daemon.app.port
    HttpPages(port, BLUE)

    assert Http(port, RED).call("POST", "/v1/tiers/disk/detach", {})[0] == 403
    assert Http(port, BLUE).call("POST", "/v1/tiers/disk/detach", {})[0] == 200


def test_pages_and_what_top_shows_travel_over_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    service = {"http_port": 0, "tls_cert": cert, "tls_key": key}
    with local_daemon(tmp_path / "kv.sock", service=service) as daemon, attach(tmp_path / "kv.sock") as store:
        save(store, store.request(prompt(3)))
        url = f"https://127.0.0.1:{daemon.daemon.app.port}"
        body = json.dumps({"tokens": prompt(3).tolist()}).encode()
        ask = Request(f"{url}/v1/pages/read", body, {"Content-Type": "application/json"})

        with urlopen(ask, timeout=WAIT_S, context=ssl.create_default_context(cafile=str(cert))) as answer:
            assert len(answer.read()) > 3 * PAGE_BYTES

        daemon.look(lambda d: d.dashboard.sample())
        assert DashboardClient(url, tls_ca=cert).get("now")["num_clients"] == 1
        with pytest.raises(TierUnavailable, match="certificate"):
            DashboardClient(url).get("now")


def test_in_a_private_network_the_api_answers_to_the_names_it_was_given(tmp_path: Path) -> None:
    service = {"http_port": 0, "http_host": "0.0.0.0", "http_names": "node,10.0.0.5"}
    with local_daemon(tmp_path / "kv.sock", service=service) as daemon:
        http = Http(daemon.daemon.app.port)
        answers = {
            name: http.call("GET", "/healthz", headers={"Host": name})[0]
            for name in ("node:8470", "10.0.0.5", "localhost", "evil.example", "")
        }

    assert answers == {"node:8470": 200, "10.0.0.5": 200, "localhost": 200, "evil.example": 400, "": 400}


@pytest.mark.parametrize("names", ["http://node", "a b", "node,"])
def test_http_names_are_names_without_ports(names: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.http_names .*such as node"):
        Config(service={"http_names": names})


def test_a_bind_for_everybody_needs_tokens(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"service\.http_host is '0\.0\.0\.0'"),
        local_daemon(tmp_path / "kv.sock", service={"http_port": 0, "http_host": "0.0.0.0"}),
    ):
        pass
