"""What the page and `kvstore top` are answered, over a daemon in this process."""

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from kvstore.direction import Direction
from kvstore.plan.records import Op, RequestOptions
from kvstore.service.dashboard import prefixes
from kvstore.service.dashboard.page import DIRECTORY
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.http_pages import HttpPages
from tests.helpers.stores import BLOCK, PAGE_BYTES, prompt, use
from tests.helpers.waiting import WAIT_S, wait_until

TOKENS = """
[[tenant]]
name = "blue"
token = "blue-token-0123456789"

[[tenant]]
name = "ops"
token = "operator-0123456789"
operator = true
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LocalDaemon]:
    sections = {"service": {"http_port": 0, "max_namespaces": 2}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        yield daemon


def fork(shared: int, tail: int, seed: int) -> list[int]:
    return [*prompt(shared, 1, tail=0).tolist(), *prompt(tail, 100 + seed).tolist()]


def play(socket: Path | None, *prompts: list[int], **options: Any) -> None:
    assert socket is not None
    with attach(socket, **options) as store:
        for tokens in prompts:
            use(store, tokens)


def sample(daemon: LocalDaemon) -> None:
    daemon.look(lambda d: d.dashboard.sample())


# ---- now


def test_this_moment_is_told_of_tiers_flows_and_clients(daemon: LocalDaemon, http: Http) -> None:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket, client="replica-0") as store:
        use(store, fork(4, 2, 0))
        use(store, fork(4, 2, 0))
        assert store.flush(WAIT_S)
        store.observe_prefill(1000, 1.0)
        sample(daemon)

        now = http.get("/v1/dashboard/now")

    assert now["status"] == "ready"
    assert now["total"]["prompt_tokens"] == 2 * (6 * BLOCK + 1)
    assert now["total"]["hit_tokens"] == {"host": 6 * BLOCK, "disk": 0, "redis": 0}
    tiers = {tier["tier"]: tier for tier in now["tiers"]}
    assert set(tiers) == {"host", "disk"}
    assert tiers["host"]["used_bytes"] == tiers["disk"]["used_bytes"] == 6 * PAGE_BYTES
    assert tiers["host"]["used_bytes"] + tiers["host"]["free_bytes"] == tiers["host"]["capacity_bytes"]
    assert tiers["disk"]["is_up"]
    assert tiers["disk"]["waiting_bytes"] == 0
    flows = {(flow["source"], flow["target"]): flow["bytes_per_s"] for flow in now["flows"]}
    assert flows["engines", "host"] > 0
    assert flows["host", "engines"] > 0
    assert flows["host", "disk"] > 0
    assert flows["redis", "host"] == 0
    (client,) = now["clients"]
    assert client["client"] == "replica-0"
    assert (client["lookups"], client["hit_tokens"], client["saved_bytes"]) == (2, 6 * BLOCK, 6 * PAGE_BYTES)
    assert now["namespaces"][0]["prefill_tokens_per_s"] == 1000
    assert [(row["tenant"], row["total"]) for row in now["tenants"]] == [("local", {**now["total"], **_span(now)})]


def _span(now: dict[str, Any]) -> dict[str, float]:
    return {"span_s": now["tenants"][0]["total"]["span_s"]}


def test_a_lookup_that_is_repeated_counts_once_for_its_client(daemon: LocalDaemon, http: Http) -> None:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        request = store.request(prompt(3))
        for _ in range(5):
            store.wait_lookup(request)
        sample(daemon)

        (client,) = http.get("/v1/dashboard/now")["clients"]

    assert (client["lookups"], client["prompt_tokens"]) == (1, 3 * BLOCK + 1)


def test_misses_carry_the_reason_that_held_then(daemon: LocalDaemon, http: Http) -> None:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        use(store, prompt(4), RequestOptions(session="chat 1"))
        assert store.flush(WAIT_S)
        store.keep.forget(store.request(prompt(4)), 2)
        use(store, prompt(4), RequestOptions(session="chat 2"))
    sample(daemon)

    now = http.get("/v1/dashboard/now")

    assert [(miss["reason"], miss["session"], miss["block"]) for miss in now["misses"]] == [
        ("deleted", "chat 2", 2),
        ("never_stored", "chat 1", 0),
    ]
    assert "block 2 was deleted from" in now["misses"][0]["text"]
    assert now["misses"][0]["hit_tokens"] == 2 * BLOCK
    assert now["reasons"] == {"deleted": 1, "never_stored": 1}


def test_a_breaker_that_opens_is_told_with_the_time_and_stays_in_the_list(daemon: LocalDaemon, http: Http) -> None:
    play(daemon.config.service.socket, fork(2, 2, 0))
    sample(daemon)
    (opened,) = daemon.look(lambda d: d.stores.all())
    lane = opened.store._dispatcher.lanes["disk"]

    lane.breaker.trip()
    sample(daemon)
    down = http.get("/v1/dashboard/now")
    wait_until(lambda: bool(lane.breaker.allow()))  # pinged after a second
    sample(daemon)
    up = http.get("/v1/dashboard/now")

    disk = next(tier for tier in down["tiers"] if tier["tier"] == "disk")
    assert not disk["is_up"]
    assert disk["num_opened"] == 1
    assert disk["since"] == down["incidents"][0]["at"]
    assert [(one["tier"], one["is_up"]) for one in up["incidents"]] == [("disk", True), ("disk", False)]


def test_a_direction_that_is_refused_is_told_with_the_mediums_words(daemon: LocalDaemon, http: Http) -> None:
    play(daemon.config.service.socket, fork(2, 2, 0))
    sample(daemon)
    (opened,) = daemon.look(lambda d: d.stores.all())
    directions = opened.store._dispatcher.lanes["disk"].directions
    breaker = directions.breakers[Direction.WRITE]
    breaker._probe_after_s = breaker._backoff_s = 1000.0

    for _ in range(3):
        directions.refused(Op.SPILL, "EROFS: Read-only file system")
    sample(daemon)
    now = http.get("/v1/dashboard/now")

    assert daemon.look(lambda d: d.state.reasons())[1] == ["disk: no write"]
    disk = next(tier for tier in now["tiers"] if tier["tier"] == "disk")
    assert disk["is_up"]
    assert disk["left_out"] == {"write": "EROFS: Read-only file system"}
    assert [(one["direction"], one["is_up"], one["reason"]) for one in now["incidents"]] == [
        ("write", False, "EROFS: Read-only file system")
    ]


# ---- over time


def test_series_go_on_where_the_last_answer_ended(daemon: LocalDaemon, http: Http) -> None:
    play(daemon.config.service.socket, fork(4, 2, 0), fork(4, 2, 0))
    sample(daemon)

    first = http.get("/v1/dashboard/series?span_s=300")
    sample(daemon)
    then = http.get(f"/v1/dashboard/series?span_s=300&since={first['at'][-1] + 1e-3}")

    assert first["step_s"] == 1.0
    assert len(first["at"]) == len(first["prompt_tokens"]) == len(first["hit_tokens"]["host"])
    assert sum(first["prompt_tokens"]) > 0
    assert then["at"]
    assert then["at"][0] > first["at"][-1]
    assert http.get("/v1/dashboard/series?span_s=86400")["step_s"] == 60.0


@pytest.mark.parametrize("query", ["span_s=0", "span_s=nan", "since=-1", "other=1", "span_s=1&span_s=2"])
def test_a_wrong_span_is_refused(http: Http, query: str) -> None:
    status, problem = http.call("GET", f"/v1/dashboard/series?{query}")

    assert status == 400
    assert problem["field"] in query


# ---- prefixes


def test_prefixes_are_told_hottest_first_with_what_continues_those_that_are_open(
    daemon: LocalDaemon, http: Http
) -> None:
    play(daemon.config.service.socket, prompt(3, 9).tolist(), *[fork(4, 1 + seed, seed) for seed in range(3)])
    sample(daemon)

    roots = http.get("/v1/dashboard/prefixes")["levels"][""]["nodes"]
    opened = http.get(f"/v1/dashboard/prefixes?open={roots[0]['id']},{'0' * 16}")

    assert [(node["tokens"], node["hits"], node["branches"]) for node in roots] == [
        (4 * BLOCK, 2, 3),
        (3 * BLOCK, 0, 0),
    ]
    assert roots[0]["deep_tokens"] == 10 * BLOCK
    assert roots[0]["bytes"]["host"] == 4 * PAGE_BYTES
    assert roots[0]["used_s"] < 60
    assert set(opened["levels"]) == {"", roots[0]["id"]}  # the other is not known
    assert sorted(node["tokens"] for node in opened["levels"][roots[0]["id"]]["nodes"]) == [16, 32, 48]
    assert opened["num_blocks"] == 13


def test_what_is_told_of_one_prefix_is_bounded(daemon: LocalDaemon, http: Http) -> None:
    most = prefixes.MAX_BRANCHES
    play(daemon.config.service.socket, *[prompt(1, seed).tolist() for seed in range(most + 5)])
    sample(daemon)

    level = http.get("/v1/dashboard/prefixes")["levels"][""]

    assert len(level["nodes"]) == most
    assert level["more"] == 5


def test_two_who_look_share_one_look(daemon: LocalDaemon, http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "FRESH_S", 60.0)
    play(daemon.config.service.socket, fork(2, 2, 0))
    sample(daemon)
    first = http.get("/v1/dashboard/prefixes")

    play(daemon.config.service.socket, prompt(4, 7).tolist())

    assert http.get("/v1/dashboard/prefixes")["levels"] == first["levels"]
    monkeypatch.setattr(prefixes, "FRESH_S", 0.0)
    monkeypatch.setattr(prefixes, "SHARE", 0)
    assert len(http.get("/v1/dashboard/prefixes")["levels"][""]["nodes"]) == 2


@pytest.mark.parametrize("ids", ["x", "abc", "0" * 16 + ",", ",".join(["0" * 16] * 65)])
def test_wrong_ids_of_prefixes_are_refused(http: Http, ids: str) -> None:
    status, problem = http.call("GET", f"/v1/dashboard/prefixes?open={ids}")

    assert (status, problem["field"]) == (400, "open")


# ---- who may see what


def test_a_tenant_sees_itself_and_an_operator_sees_all(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TOKENS)
    tokens.chmod(0o600)
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0, "tokens_file": tokens}) as daemon:
        port = daemon.daemon.app.port
        play(tmp_path / "kv.sock", fork(2, 2, 0))
        tenant = HttpPages(port, "blue-token-0123456789")
        assert tenant.load(fork(2, 2, 1)) == 0
        tenant.save(fork(2, 2, 1))
        sample(daemon)
        blue, ops = Http(port, "blue-token-0123456789"), Http(port, "operator-0123456789")

        seen = {who: client.get("/v1/dashboard/now") for who, client in (("blue", blue), ("ops", ops))}
        nodes = {
            who: client.get("/v1/dashboard/prefixes")["levels"][""]["nodes"]
            for who, client in (("blue", blue), ("ops", ops))
        }

        assert {row["tenant"] for row in seen["blue"]["tenants"]} == {"blue"}
        assert {miss["tenant"] for miss in seen["blue"]["misses"]} == {"blue"}
        assert {row["tenant"] for row in seen["ops"]["tenants"]} == {"blue", "local"}
        assert {node["tenant"] for node in nodes["blue"]} == {"blue"}
        assert {node["tenant"] for node in nodes["ops"]} == {"blue", "local"}
        assert blue.call("GET", "/v1/dashboard/now?tenant=local")[0] == 404
        assert {row["tenant"] for row in ops.get("/v1/dashboard/now?tenant=local")["tenants"]} == {"local"}
        for path in ("now", "series", "prefixes"):
            assert Http(port).call("GET", f"/v1/dashboard/{path}")[0] == 401


# ---- the page's files


def test_the_page_and_all_it_refers_to_are_answered_under_a_strict_policy(http: Http) -> None:
    names = {path.name for path in DIRECTORY.iterdir()}
    assert {"index.html", "main.js", "page.css", "uplot-1.6.32.min.js", "uplot-1.6.32.LICENSE.txt"} <= names
    for path in [
        "/",
        *(f"/page/{name}" for name in sorted(names) if name not in ("index.html", "uplot-1.6.32.LICENSE.txt")),
    ]:
        connection = HTTPConnection("127.0.0.1", http.port, timeout=WAIT_S)
        connection.request("GET", path)
        answer = connection.getresponse()
        body, tag = answer.read(), answer.headers["ETag"]
        assert answer.status == 200, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert b"http://" not in body.replace(b"http://127.0.0.1:8000", b"").replace(b"http://www.w3.org/2000/svg", b"")
        connection.request("GET", path, headers={"If-None-Match": tag})
        assert connection.getresponse().status == 304
        connection.close()


def test_no_script_or_style_is_inline() -> None:
    page = (DIRECTORY / "index.html").read_text()

    assert "style=" not in page
    assert "onclick" not in page
    assert page.count("<script") == page.count("<script src=") == 2


def test_another_host_does_not_get_the_page(http: Http) -> None:
    assert http.call("GET", "/", headers={"Host": "evil.example"})[0] == 400
    assert http.call("GET", "/page/../daemon.py")[0] == 404


@pytest.mark.parametrize("said", ["", "x" * 16, "<b>", "a" * 65, "0a\n"])
def test_only_fingerprints_that_differ_are_told(daemon: LocalDaemon, http: Http, said: str) -> None:
    socket = daemon.config.service.socket
    assert socket is not None
    with (
        attach(socket, client="a", rendering="01ab") as store,
        attach(socket, client="b", rendering=said),
        attach(socket, client="c", rendering="01ab"),
    ):
        use(store, fork(1, 0, 0))
        sample(daemon)
        assert http.get("/v1/dashboard/now")["renderings"] == []

        with attach(socket, client="d", rendering="02cd"):
            found = http.get("/v1/dashboard/now")["renderings"]

    assert [(one["rendering"], one["clients"], one["num_clients"]) for one in found] == [
        ("01ab", ["a", "c"], 2),
        ("02cd", ["d"], 1),
    ]
