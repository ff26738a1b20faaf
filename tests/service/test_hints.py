"""Hints to a real daemon: by its socket and by HTTP; tenants, restarts, and clients that die."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from kvstore.base import HintStatus
from kvstore.plan.records import RequestOptions
from kvstore.ports import free_port
from kvstore.requests import payer_of
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import DaemonProcess, Http, LocalDaemon, attach, local_daemon
from tests.helpers.hints import envelope
from tests.helpers.http_pages import HttpPages
from tests.helpers.stores import BLOCK, LAYOUT, ids, namespace, prompt, save, use
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

PINNING_CLIENT = """
import os, signal, sys
from pathlib import Path
from tests.helpers.daemons import attach
from tests.helpers.hints import envelope
from tests.helpers.stores import prompt, save

store = attach(Path(sys.argv[1]), client="agent")
request = store.request(prompt(10))
store.hint(envelope(("pin", {"ttl_s": 5, "session": "s"})), request)
save(store, request)
store.keep.finished(request)
print(store.stats()["kept_pages"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(
        tmp_path / "kv.sock", tmp_path / "disk", service={"http_port": 0}, store={"load_or_recompute": False}
    ) as daemon:
        yield daemon
        for opened in daemon.daemon.stores.all():
            opened.store.check()


def post(http: Http, *actions: tuple[str, dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """The outcomes of a message over HTTP."""
    answer = http.post("/v1/hints", **envelope(*actions), **fields)
    assert answer["message_id"] == "m"
    outcomes: list[dict[str, Any]] = answer["outcomes"]
    return outcomes


def test_a_client_pins_its_prompt_before_it_is_saved_and_http_gives_it_back(daemon: LocalDaemon) -> None:
    http = Http(daemon.daemon.app.port)
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket, client="agent") as store:
        request = store.request(prompt(20), RequestOptions(tenant="t"))
        (outcome,) = store.hint(envelope(("pin", {"session": "s"})), request)
        save(store, request)
        store.keep.finished(request)

        assert outcome.status is HintStatus.DEFERRED
        (kept,) = http.get("/v1/clients")["kept"]
        assert (kept["slots"], kept["salt"]) == (16, payer_of("t"))  # a quarter of 64 slots
        assert kept["holder"].startswith("agent (client ")
        assert kept["holder"].endswith(", session s")
        (shown,) = wait_until(lambda: http.get("/v1/dashboard/now")["kept"])  # by its next sample
        assert shown | {"until": 0} == kept | {"until": 0}
        assert shown["until"] == pytest.approx(kept["until"], abs=1.0)  # asked of two clocks anew

        again = store.request(prompt(20), RequestOptions(tenant="t"))
        assert store.hint(envelope(("release", {"session": "s"})), again)[0].tokens == 16 * BLOCK
        assert http.get("/v1/clients")["kept"] == []
        stats = store.stats()
    assert stats["hints"] == {"pin": {"deferred": 1}, "release": {"accepted": 1}}


def test_actions_about_several_prompts_are_answered_in_their_order(daemon: LocalDaemon) -> None:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        use(store, prompt(4, seed=1))
        request = store.request(prompt(3, seed=2))
        outcomes = store.hint(
            envelope(
                ("pin", {"tokens": ids(4, seed=1)}),
                ("retain", {}),
                ("teleport", {}),
                ("pin", {"ttl_s": -1}),
                ("share", {}),
                ("pin", {}),
            ),
            request,
        )
        stats = store.stats()

    assert [outcome.action_id for outcome in outcomes] == list("012345")
    assert [outcome.status.value for outcome in outcomes] == [
        "accepted",
        "deferred",
        "ignored",
        "rejected",
        "accepted",
        "deferred",
    ]
    assert stats["hints"] == {
        "pin": {"rejected": 1, "accepted": 1, "deferred": 1},
        "retain": {"deferred": 1},
        "unknown": {"ignored": 1},
        "share": {"accepted": 1},
    }


def test_without_a_daemon_actions_are_rejected(tmp_path: Path) -> None:
    with attach(tmp_path / "nowhere.sock") as store:
        outcomes = store.hint(envelope(("pin", {"tokens": ids(4)}), ("share", {})))

    assert [outcome.status.value for outcome in outcomes] == ["rejected", "accepted"]


def test_hints_over_http_during_a_tool_call(daemon: LocalDaemon) -> None:
    http = Http(daemon.daemon.app.port)
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        request = store.request(prompt(6))
        save(store, request)

        pin, retain = post(
            http,
            ("pin", {"tokens": ids(6), "ttl_s": 1e6}),
            ("retain", {"block_hashes": [k.hex() for k in request.keys]}),
        )
        assert (pin["status"], pin["tokens"], pin["action"]) == ("clipped", 6 * BLOCK, "pin")
        assert (retain["status"], retain["tokens"]) == ("accepted", 6 * BLOCK)
        assert post(http, ("release", {"tokens": ids(6)}))[0]["tokens"] == 6 * BLOCK
        assert post(http, ("forget", {"tokens": ids(6)}))[0]["tokens"] == 6 * BLOCK
        assert store.lookup(store.request(prompt(6))).num_blocks == 0
    metrics = http.get("/metrics").decode()
    assert 'kvstore_hints_total{action="pin",namespace="' in metrics
    assert 'outcome="clipped"' in metrics


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"protocol_version": "1.0"}, 400),
        ({"protocol_version": 1, "actions": []}, 400),
        ({"protocol_version": "1.0", "actions": {}}, 400),
        ({"protocol_version": "1.0", "actions": [], "other": 1}, 400),
        (b'{"protocol_version": "1.0", "actions": ' + b"[" * 50_000, 400),
        ({"protocol_version": "1.0", "actions": [], "namespace": "0" * 32}, 404),
    ],
)
def test_a_body_that_is_no_message_is_refused(daemon: LocalDaemon, body: Any, status: int) -> None:
    http = Http(daemon.daemon.app.port)
    http.post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace()))
    headers = {"Content-Type": "application/json"}

    assert http.call("POST", "/v1/hints", body, headers=headers)[0] == status


def test_a_message_of_too_many_bytes_is_an_outcome(daemon: LocalDaemon) -> None:
    http = Http(daemon.daemon.app.port)
    http.post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace()))

    (outcome,) = post(http, ("pin", {"tokens": [10**9] * 250_000}))

    assert (outcome["action"], outcome["status"]) == ("envelope", "rejected")


def test_neither_is_its_size_hidden_by_chunks(daemon: LocalDaemon) -> None:
    http = Http(daemon.daemon.app.port)
    http.post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace()))
    body = json.dumps(envelope(("pin", {"tokens": [10**9] * 250_000}))).encode()

    connection = HTTPConnection("127.0.0.1", daemon.daemon.app.port, timeout=30)
    with closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/hints", iter([body]), headers, encode_chunked=True)
        (outcome,) = json.loads(connection.getresponse().read())["outcomes"]

    assert (outcome["action"], outcome["status"]) == ("envelope", "rejected")


def test_half_a_surrogate_pair_is_told_and_kept_nowhere(daemon: LocalDaemon) -> None:
    http = Http(daemon.daemon.app.port)
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        use(store, prompt(4, seed=1))
        sent = envelope(("pin", {"tokens": ids(4, seed=1), "session": "\ud800"}), ("share", {}))
        sent["actions"][1]["action_id"] = "\ud800"

        outcomes = store.hint(sent)
        (told, _) = http.post("/v1/hints", **sent)["outcomes"]

    assert [outcome.status for outcome in outcomes] == [HintStatus.REJECTED] * 2
    assert (told["status"], told["reason"]) == ("rejected", "session is no text")
    assert http.get("/v1/clients")["kept"] == []


def test_no_tenant_names_what_another_has(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TENANTS)
    tokens.chmod(0o600)
    service = {"http_port": free_port(), "tokens_file": tokens}
    with local_daemon(tmp_path / "kv.sock", service=service, store={"load_or_recompute": False}) as daemon:
        port = daemon.daemon.app.port
        blue, red = HttpPages(port, BLUE), HttpPages(port, RED)
        blue.save(prompt(6))
        red.save(prompt(3, seed=1))
        theirs = Http(port, BLUE).get("/v1/namespaces")["namespaces"][0]["id"]

        outcomes = post(
            Http(port, RED),
            *[(kind, {"tokens": ids(6)}) for kind in ("pin", "retain", "prefetch", "release", "forget")],
        )

        assert [outcome["tokens"] for outcome in outcomes] == [0] * 5
        assert [outcome["status"] for outcome in outcomes[:4]] == ["rejected"] * 4
        assert blue.lookup(prompt(6))["num_blocks"] == 6
        body = envelope(("forget", {"tokens": ids(6)})) | {"namespace": theirs}
        red_status, _ = Http(port, RED).call("POST", "/v1/hints", body)
        assert red_status in (200, 404)  # equal namespaces have one id: it is then their own
        assert blue.lookup(prompt(6))["num_blocks"] == 6
        assert Http(port, "no-such-token-0123").call("POST", "/v1/hints", body)[0] == 401


def test_the_pins_of_a_client_that_was_killed_end_when_their_time_is_over_and_a_restart_keeps_none(
    tmp_path: Path,
) -> None:
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk")
    try:
        with attach(daemon.socket) as store:
            done = subprocess.run(
                [sys.executable, "-c", PINNING_CLIENT, str(daemon.socket)],
                cwd=Path(__file__).resolve().parents[2],
                stdout=subprocess.PIPE,
                timeout=120,
            )
            assert done.stdout.split() == [b"10"]
            wait_until(lambda: store.stats()["kept_pages"] == 0)
            assert store.stats()["pinned_pages"] == 0
            assert store.lookup(store.request(prompt(10))).num_blocks == 10

            store.hint(envelope(("pin", {"tokens": ids(10)})))
            assert store.stats()["kept_pages"] == 10
        daemon.kill()
        daemon.start()
        with attach(daemon.socket) as store:
            assert store.stats()["kept_pages"] == 0
    finally:
        daemon.kill()
