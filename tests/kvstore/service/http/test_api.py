"""The HTTP API against a daemon in this process."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.plan.records import RequestOptions
from kvstore.service.client.connect import connect
from kvstore.service.client.store import RemoteStore
from kvstore.service.http import pages
from kvstore.service.http.routes import Route
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.http_pages import framed, unframed
from tests.helpers.stores import LAYOUT, PAGE_BYTES, ids, load, namespace, page_of, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    with local_daemon(
        tmp_path / "kv.sock",
        tmp_path / "disk",
        service={"http_port": 0, "max_namespaces": 2},
        store={"load_or_recompute": False},
    ) as daemon:
        yield daemon
        for opened in daemon.daemon.stores.all():
            opened.store.check()


# ---- health, metrics, statistics


def test_health_and_readiness_are_told_apart(http: Http, daemon: LocalDaemon) -> None:
    assert http.get("/healthz")["status"] == "ok"
    assert http.get("/readyz") == {"status": "ready", "reasons": []}

    daemon.look(lambda d: setattr(d.state.progress, "is_ready", False))

    assert http.get("/healthz")["status"] == "ok"
    assert http.call("GET", "/readyz")[0] == 503


def test_metrics_name_tenant_and_namespace(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(3)))

    text = http.get("/metrics").decode()

    assert 'kvstore_saved_pages_total{namespace="' in text
    assert 'tenant="local"} 3.0' in text
    assert "kvstore_service_clients 1.0" in text
    assert text.count("# TYPE kvstore_saved_pages_total") == 1


def test_stats_are_those_of_the_store(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(3)))

    (stats,) = http.get("/v1/stats")["namespaces"].values()

    assert stats["saved_pages"] == 3
    assert stats["slots"]["resident"] == 3


# ---- prefixes


def test_lookup_by_tokens_and_by_keys_agree(http: Http, store: RemoteStore) -> None:
    request = store.request(prompt(5))
    save(store, request)

    by_tokens = http.post("/v1/lookup", tokens=ids(5))
    by_keys = http.post("/v1/lookup", keys=[key.hex() for key in request.keys])

    assert by_tokens == by_keys
    assert by_tokens["num_blocks"] == 5
    assert by_tokens["by_tier"] == {"host": 5}


def test_a_flush_tells_what_is_on_its_tiers(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(5)))

    flushed = http.post("/v1/flush", timeout_s=10.0)

    assert flushed["ok"] is True
    assert flushed["missing"] == flushed["undeleted"] == {}
    assert http.post("/v1/flush")["ok"] is True


def test_pin_unpin_ttl_and_delete_concern_the_prefix(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(5)))

    pinned = http.post("/v1/pin", tokens=ids(5))
    assert pinned["blocks"] == 5
    assert 0 < pinned["until"] - time.time() <= 86400
    assert store.stats()["pinned_pages"] == 5
    assert http.post("/v1/unpin", tokens=ids(5)) == {"blocks": 5}
    assert http.post("/v1/ttl", tokens=ids(5), ttl_s=1000) == {"blocks": 5}
    assert http.post("/v1/delete", tokens=ids(5), first=2) == {"blocks": 3, "owed": {}}
    assert http.post("/v1/lookup", tokens=ids(5))["num_blocks"] == 2


def test_a_pin_of_more_than_the_budget_is_granted_in_part_and_told(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(20)))

    assert http.post("/v1/pin", tokens=ids(20))["blocks"] == 16  # half of this namespace's 32 slots
    assert http.post("/v1/pin", tokens=ids(20, seed=1)) == {"blocks": 0, "until": None}

    (kept,) = http.get("/v1/clients")["kept"]
    assert (kept["holder"], kept["tenant"], kept["slots"]) == ("http", "local", 16)
    assert 0 < kept["until"] - time.time() <= 86400
    stats = store.stats()
    assert (stats["kept_pages"], stats["keep_refused_pages"]) == (16, 4)


def test_who_keeps_what_until_when_is_told_also_of_a_client_that_is_gone(http: Http, daemon: LocalDaemon) -> None:
    assert daemon.config.service.socket is not None
    until = time.time() + 60
    with attach(daemon.config.service.socket, client="engine") as engine:
        use(engine, prompt(5), RequestOptions(retain_until=until))
        (client,) = http.get("/v1/clients")["clients"]
        assert client["kept_slots"] == 5
        assert client["kept_until"] == pytest.approx(until, abs=5)
    wait_until(lambda: not http.get("/v1/clients")["clients"])

    (kept,) = http.get("/v1/clients")["kept"]

    assert (kept["holder"], kept["slots"]) == (f"engine (client {client['id']})", 5)
    assert kept["until"] == pytest.approx(until, abs=5)


def test_a_time_to_live_ends(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(2)))
    http.post("/v1/ttl", tokens=ids(2), ttl_s=0.05)

    wait_until(lambda: http.post("/v1/explain", tokens=ids(2))["reason"] == "expired")


def test_prefetch_brings_a_prefix_into_host_memory(http: Http, store: RemoteStore) -> None:
    for seed in range(5):
        use(store, prompt(10, seed))
        assert store.flush(WAIT_S)
    assert http.post("/v1/lookup", tokens=ids(10))["by_tier"] == {"disk": 10}

    ticket = http.post("/v1/prefetch", tokens=ids(10))["ticket"]

    wait_until(lambda: http.post("/v1/lookup", tokens=ids(10))["by_tier"].get("host", 0) >= 8)
    http.post("/v1/prefetch/cancel", ticket=ticket)


def test_clear_deletes_a_namespace_and_no_other(http: Http, store: RemoteStore, daemon: LocalDaemon) -> None:
    other_namespace = namespace(model="other")
    with connect(f"unix://{daemon.config.service.socket}", LAYOUT, other_namespace) as other:
        use(store, prompt(5))
        use(other, prompt(5))
        assert store.flush(WAIT_S)
        own = next(n["id"] for n in http.get("/v1/namespaces")["namespaces"] if n["model"] == "tiny")

        assert http.call("POST", f"/v1/namespaces/{own}/clear") == (200, {"blocks": 5, "keys": {}})

        assert store.lookup(store.request(prompt(5))).num_blocks == 0
        assert other.lookup(other.request(prompt(5))).num_blocks == 5


# ---- explain


def test_explain_tells_each_reason(http: Http, store: RemoteStore, daemon: LocalDaemon) -> None:
    def reason(num_blocks: int, seed: int = 0) -> str:
        explained = http.post("/v1/explain", tokens=ids(num_blocks, seed))
        assert explained["text"]
        told: str = explained["reason"]
        return told

    assert reason(4) == "never_stored"
    save(store, store.request(prompt(4)))
    assert reason(4) == "hit"
    assert http.post("/v1/explain", tokens=[1, 2, 3])["reason"] == "too_short"
    http.post("/v1/delete", tokens=ids(4), first=1)
    assert reason(4) == "deleted"

    with connect(f"unix://{daemon.config.service.socket}", LAYOUT, namespace(model="other", salt="s")) as other:
        save(other, other.request(prompt(6, 9)))
        own = next(n["id"] for n in http.get("/v1/namespaces")["namespaces"] if n["model"] == "tiny")
        explained = http.post("/v1/explain", namespace=own, tokens=ids(6, 9))
        assert explained["reason"] == "other_namespace"
        assert explained["elsewhere"][0]["differs"] == ["model", "salt"]
        assert "model, salt" in explained["text"]


def test_explain_tells_when_and_whence_a_page_was_evicted(http: Http, store: RemoteStore) -> None:
    http.call("POST", "/v1/tiers/disk/detach", {})
    save(store, store.request(prompt(10)))
    for seed in range(1, 5):
        save(store, store.request(prompt(10, seed)))

    explained = http.post("/v1/explain", tokens=ids(10))

    assert (explained["reason"], explained["left_tier"]) == ("evicted", "host")
    assert f"block {explained['block']} was evicted from host at 20" in explained["text"]


# ---- tiers


def test_what_a_policy_believes_is_told_by_tier(tmp_path: Path) -> None:
    sections = {"service": {"http_port": 0}, "host": {"policy": "outlook"}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        with attach(tmp_path / "kv.sock") as store:
            for seed in range(5):
                request = store.request(prompt(3, seed))
                save(store, request)
                store.keep.finished(request, finish_reason="tool_calls", reply_tokens=700)

        answer = Http(daemon.daemon.app.port).get("/v1/policies")

    assert answer["spans_s"] == [60.0, 300.0, 3600.0]
    host, disk = answer["policies"]
    assert (host["tier"], host["policy"], host["learns"]) == ("host", "outlook", True)
    assert host["num_classes"] == len(host["classes"])
    words = [one["words"] for one in host["classes"]]
    assert words[:3] == [[], ["used once"], ["used once", "after tool_use"]]
    assert any("reply of more than 640 tokens" in one for one in words)
    assert host["classes"][0]["seen"] == 15
    assert (disk["tier"], disk["policy"], disk["learns"], disk["classes"]) == ("disk", "lru", False, [])


def test_a_tier_is_detached_and_attached_while_it_is_used(http: Http, store: RemoteStore) -> None:
    for seed in range(5):
        use(store, prompt(10, seed))
        assert store.flush(WAIT_S)
    assert load(store, store.request(prompt(10)))[1].by_tier == {"disk": 10}
    for seed in range(1, 5):
        load(store, store.request(prompt(10, seed)))

    status, tiers = http.call("POST", "/v1/tiers/disk/detach", {})
    assert (status, [tier["tier"] for tier in tiers["tiers"]]) == (200, ["host"])
    assert http.post("/v1/explain", tokens=ids(10))["reason"] == "detached"
    assert http.call("POST", "/v1/tiers/disk/detach", {})[0] == 409

    tiers = http.post("/v1/tiers/disk/attach")["tiers"]
    assert [(tier["tier"], tier["is_up"]) for tier in tiers] == [("host", True), ("disk", True)]
    assert load(store, store.request(prompt(10)))[1].by_tier == {"disk": 10}
    assert http.call("POST", "/v1/tiers/disk/attach", {})[0] == 409


def test_host_memory_is_resized_while_it_is_used(http: Http, store: RemoteStore) -> None:
    save(store, store.request(prompt(20)))
    lease = store.prepare_load(store.request(prompt(20)), 20)

    http.post("/v1/tiers/host/resize", capacity_bytes=8 * PAGE_BYTES)

    assert load(store, store.request(prompt(20)))[0] == 20
    store.complete(lease)
    wait_until(lambda: store.stats()["slots"]["resident"] <= 8)
    http.post("/v1/tiers/host/resize", capacity_bytes=32 * PAGE_BYTES)
    assert sum(store.stats()["slots"].values()) == 32
    save(store, store.request(prompt(20, 1)))
    assert load(store, store.request(prompt(20, 1)))[0] == 20


def test_disk_is_resized_while_it_is_used(http: Http, store: RemoteStore) -> None:
    use(store, prompt(10))
    assert store.flush(WAIT_S)

    tiers = http.post("/v1/tiers/disk/resize", capacity_bytes=256 * PAGE_BYTES)["tiers"]

    disk = next(tier for tier in tiers if tier["tier"] == "disk")
    assert disk["capacity_bytes"] == 256 * PAGE_BYTES
    assert disk["pages"] == 10


def test_what_cannot_be_attached_or_resized_is_told(http: Http, store: RemoteStore) -> None:
    assert http.call("POST", "/v1/tiers/redis/attach", {})[0] == 409
    assert http.call("POST", "/v1/tiers/redis/attach", {"url": "redis://127.0.0.1:1"})[0] == 403
    assert http.call("POST", "/v1/tiers/tape/detach", {})[0] == 404
    assert http.call("POST", "/v1/tiers/host/detach", {})[0] == 404
    assert http.call("POST", "/v1/tiers/redis/resize", {"capacity_bytes": 1 << 20})[0] == 409
    status, problem = http.call("POST", "/v1/tiers/host/resize", {"capacity_bytes": 1 << 40})
    assert (status, problem["detail"]) == (409, "host: 134217728 slots are asked for; the slab has 1 to 32")


# ---- pages


def put(http: Http, body: bytes) -> tuple[int, Any]:
    return http.call("PUT", "/v1/pages", body, headers={"Content-Type": pages.CONTENT_TYPE})


def test_pages_that_were_put_are_found_by_engines_and_can_be_read(http: Http, store: RemoteStore) -> None:
    request = store.request(prompt(4))
    data = {block: page_of(key, 0, PAGE_BYTES).tobytes() for block, key in enumerate(request.keys)}

    assert put(http, framed(ids(4), data)) == (200, {"blocks": 4})
    assert load(store, request)[0] == 4
    status, raw = http.call("POST", "/v1/pages/read", {"tokens": ids(4), "num_blocks": 3})

    assert status == 200
    assert unframed(raw) == {block: data[block] for block in range(3)}
    assert store.stats()["leases"] == 0


def test_a_put_that_breaks_off_or_lies_stores_nothing_of_the_page(http: Http, store: RemoteStore) -> None:
    whole = framed(ids(2), {0: bytes(PAGE_BYTES), 1: bytes(PAGE_BYTES)})

    for body, field in (
        (whole[:-1], "body"),
        (whole[:3], "body"),
        (framed(ids(2), {1: bytes(PAGE_BYTES)}, checksum=1), "checksum"),
        (framed(ids(2), {0: bytes(100)}), "length"),
        (framed(ids(2), {7: bytes(PAGE_BYTES)}), "block"),
        (struct.pack("<I", 1 << 31), "prompt"),
        (struct.pack("<I", 2) + b"{}", "prompt"),
    ):
        status, problem = put(http, body)
        assert (status in (400, 413), problem["field"]) == (True, field), problem

    stats = store.stats()
    assert (stats["leases"], stats["slots"]["filling"]) == (0, 0)
    assert store.lookup(store.request(prompt(2))).num_blocks <= 1


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, -1]}, "tokens.1"),
        ({"tokens": [1 << 32]}, "tokens.0"),
        ({"tokens": ["1"]}, "tokens.0"),
        ({"tokens": [1], "keys": ["00" * 32]}, "body"),
        ({"keys": ["zz"]}, "keys.0"),
        ({"tokens": [1], "timeout_s": 11}, "timeout_s"),
        ({"tokens": [1], "namespace": "x"}, "namespace"),
        ({"tokens": [1], "colour": "red"}, "colour"),
        ([1], "body"),
    ],
)
def test_a_wrong_body_names_the_field(http: Http, store: RemoteStore, body: Any, field: str) -> None:
    status, problem = http.call("POST", "/v1/lookup", body)

    assert (status, problem["field"], problem["status"]) == (400, field, 400)


def test_other_kinds_of_request_get_problems_too(http: Http, store: RemoteStore) -> None:
    for method, path, body, headers, expected in (
        ("GET", "/v2", None, {}, 404),
        ("GET", "/v1/lookup", None, {}, 405),
        ("POST", "/v1/lookup", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/lookup", b"{", {"Content-Type": "application/json"}, 400),
        ("POST", "/v1/lookup", b" " * (17 << 20), {"Content-Type": "application/json"}, 413),
        ("POST", "/v1/lookup", {"tokens": [1], "namespace": "0" * 32}, {}, 404),
        ("GET", "/v1/stats?namespace=0&namespace=1", None, {}, 400),
        ("GET", "/v1/stats?colour=red", None, {}, 400),
        ("GET", "/healthz", None, {"Host": "evil.example"}, 400),
        ("GET", "/v1/channel", None, {}, 404),
    ):
        status, problem = http.call(method, path, body, headers=headers)  # type: ignore[arg-type]

        assert status == expected, (method, path, problem)
        assert problem["status"] == expected


def test_without_a_namespace_it_must_be_clear_which(http: Http) -> None:
    assert http.call("POST", "/v1/lookup", {"tokens": [1]})[1]["detail"] == "none is open"

    http.post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace()))
    assert http.post("/v1/lookup", tokens=[1])["cut"] == "too_short"
    http.post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace(model="b")))

    status, problem = http.call("POST", "/v1/lookup", {"tokens": [1]})
    assert (status, problem["field"]) == (409, "namespace")
    third = {"layout": layout_to_json(LAYOUT), "namespace": namespace_to_json(namespace(model="c"))}
    assert http.call("POST", "/v1/namespaces", third)[0] == 409


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"block_size": 0}, "layout.block_size"),
        ({"groups": []}, "layout.groups"),
        ({"shards": "1"}, "layout.shards"),
        ({"colour": 1}, "layout.colour"),
    ],
)
def test_a_wrong_layout_names_the_field(http: Http, change: dict[str, Any], field: str) -> None:
    body = {"layout": layout_to_json(LAYOUT) | change, "namespace": namespace_to_json(namespace())}

    status, problem = http.call("POST", "/v1/namespaces", body)

    assert (status, problem["field"]) == (400, field)


def test_the_document_describes_every_route_that_is_served(http: Http, daemon: LocalDaemon) -> None:
    document = http.get("/v1/openapi.json")

    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    routes: list[Route] = daemon.daemon.app.routes
    assert described == {(route.method, route.path) for route in routes}
    assert document["openapi"] == "3.1.0"
