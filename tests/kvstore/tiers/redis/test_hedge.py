"""Idle connections that are dead and do not say so: the call is answered all the same, within its time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from kvstore.errors import TierUnavailable
from kvstore.testing.pages import TIMEOUT_S, fetch, keys_of, payload, store
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis import node as redis_node
from kvstore.tiers.redis.hedge import Hedge
from kvstore.tiers.redis.node import Node
from kvstore.tiers.redis.route import KEEPALIVE, make_route
from kvstore.tiers.redis.tier import RedisTier
from kvstore.tiers.redis.url import parse_redis_url
from tests.helpers.nat import Nat
from tests.helpers.redis_products import ON_EACH_PRODUCT, Product
from tests.helpers.redis_server import NEEDS_OPENSSL, make_certificate

SLOT_BYTES = 8192
KEYS = keys_of("page", 3)
PATIENT_S = 20.0


class Line:
    """One end of a socket pair, as a connection of which `deadline` seconds are left."""

    def __init__(self, seconds: float = PATIENT_S) -> None:
        self.link, self.peer = socket.socketpair()
        self.deadline = time.monotonic() + seconds
        self.holds_bytes = False
        self.is_closed = False

    def send(self, buffers: object, *, replies: int = 0) -> None:
        for buffer in buffers:  # type: ignore[attr-defined]
            self.link.sendall(buffer)

    def close(self) -> None:
        self.is_closed = True
        self.link.close()


@pytest.fixture
def old() -> Iterator[Line]:
    line = Line()
    yield line
    line.link.close()
    line.peer.close()


@pytest.fixture
def fresh() -> Iterator[Line]:
    line = Line()
    yield line
    line.link.close()
    line.peer.close()


def hedge_with(dial: Callable[[float], Line], dropped: list[str]) -> Hedge[Line]:
    return Hedge(dial, lambda: dropped.append("idle"))


def test_a_connection_that_answers_is_kept(old: Line) -> None:
    def dial(deadline: float) -> Line:
        raise AssertionError("nobody should dial")

    hedge = hedge_with(dial, [])
    assert hedge.send(old, [b"ask"])
    old.peer.sendall(b"answer")

    assert hedge.await_answer(old) is None


def test_a_silent_connection_is_replaced_and_all_requests_are_asked_again(old: Line, fresh: Line) -> None:
    dropped: list[str] = []
    hedge = hedge_with(lambda deadline: fresh, dropped)
    old.deadline = time.monotonic() + 1.0
    assert hedge.send(old, [b"one", b"two"])
    assert hedge.send(old, [b"three"])
    fresh.peer.sendall(b"answer")

    assert hedge.await_answer(old) is fresh
    assert fresh.peer.recv(99) == b"onetwothree"
    assert dropped == ["idle"]  # others of its age


def test_an_answer_that_comes_late_on_the_old_connection_is_taken(old: Line, fresh: Line) -> None:
    def dial(deadline: float) -> Line:
        old.peer.sendall(b"at last")
        return fresh

    hedge = hedge_with(dial, [])
    old.deadline = time.monotonic() + 1.0
    assert hedge.send(old, [b"ask"])

    assert hedge.await_answer(old) is None
    assert fresh.is_closed


def test_a_connection_that_has_ended_is_replaced_without_waiting(old: Line, fresh: Line) -> None:
    hedge = hedge_with(lambda deadline: fresh, [])
    assert hedge.send(old, [b"ask"])
    old.peer.close()

    began = time.monotonic()
    assert hedge.await_answer(old) is fresh
    assert time.monotonic() - began < PATIENT_S / 8


def test_where_nothing_can_be_dialled_the_old_connection_has_the_rest_of_the_time(old: Line) -> None:
    def dial(deadline: float) -> Line:
        raise TierUnavailable("refused")

    hedge = hedge_with(dial, [])
    old.deadline = time.monotonic() + 0.2
    assert hedge.send(old, [b"ask"])

    assert hedge.await_answer(old) is None


def test_what_a_dead_connection_does_not_take_is_sent_on_another(old: Line) -> None:
    hedge = hedge_with(lambda deadline: old, [])
    old.peer.close()

    assert not hedge.send(old, [b"ask" * 1000])


# ---- the tier --------------------------------------------------------------------------------------------------------


@pytest.fixture
def suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection that is taken up again counts as idle for long."""
    monkeypatch.setattr(redis_node, "IDLE_S", 0.0)


@pytest.fixture
def nat() -> Iterator[Nat]:
    with LocalRedis() as server, Nat(server.port) as nat:
        yield nat


CALLS: dict[str, Callable[[RedisTier], object]] = {
    "contains": lambda tier: tier.contains(KEYS, timeout_s=PATIENT_S) == [True] * 3,
    "read": lambda tier: fetch(tier, KEYS, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in KEYS],
    "write": lambda tier: store(tier, keys_of("new", 3), SLOT_BYTES) == [True] * 3,
    "touch": lambda tier: tier.touch(KEYS, expires_at=0.0, timeout_s=PATIENT_S) == [True] * 3,
    "delete": lambda tier: tier.delete(KEYS, timeout_s=PATIENT_S) is None,
    "claim": lambda tier: tier.claim(KEYS, token=b"us", lease_s=9.0, timeout_s=PATIENT_S) == [True] * 3,
    "sweep": lambda tier: tier.sweep(timeout_s=PATIENT_S) >= 3,
    "ping": lambda tier: tier.ping(timeout_s=PATIENT_S) is None,
}


class TestForgottenConnections:
    pytestmark = ON_EACH_PRODUCT

    @pytest.mark.usefixtures("suspicious")
    @pytest.mark.parametrize("call", CALLS)
    def test_every_call_is_answered_though_its_connection_was_forgotten(self, nat: Nat, call: str) -> None:
        with closing(RedisTier(f"redis://127.0.0.1:{nat.port}", slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            assert store(tier, KEYS, SLOT_BYTES) == [True] * 3
            nat.forget()

            assert CALLS[call](tier)

            assert nat.num_connections == 2
            assert tier.counters.extra["timeouts"] == 0

    @pytest.mark.usefixtures("suspicious")
    def test_one_forgotten_connection_makes_all_of_them_new(self, nat: Nat) -> None:
        with closing(RedisTier(f"redis://127.0.0.1:{nat.port}", slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            threads = [threading.Thread(target=store, args=(tier, keys_of(f"{i}", 64), SLOT_BYTES)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            nat.forget()
            before = nat.num_connections
            for _ in range(4):
                tier.contains(KEYS, timeout_s=PATIENT_S)

            assert nat.num_connections == before + 1

    def test_what_may_be_asked_once_only_is_not_repeated(
        self, nat: Nat, suspicious: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(RedisTier(f"redis://127.0.0.1:{nat.port}", slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            name = tier.name_of(b"ledger")
            tier.ask(name, [(b"ZADD", name, 1, b"a")], timeout_s=PATIENT_S)
            nat.forget()

            with pytest.raises(TierUnavailable, match="no answer in time"):
                tier.ask(name, [(b"ZPOPMIN", name, 1)], timeout_s=0.3, repeatable=False)
            assert nat.num_connections == 1

    def test_a_connection_closed_at_the_moment_of_asking_is_replaced_whatever_its_age(self) -> None:
        with LocalRedis() as server, closing(RedisTier(server.url, slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            store(tier, KEYS, SLOT_BYTES)
            (node,) = tier._route.nodes(time.monotonic() + 1)
            ((wire, _),) = node._idle
            wire.resume = lambda deadline, hedge=None: _taken(wire, deadline, hedge)  # type: ignore[method-assign]
            link = wire.link
            assert link is not None
            link.shutdown(socket.SHUT_RDWR)

            assert tier.contains(KEYS, timeout_s=TIMEOUT_S) == [True] * 3

    @NEEDS_OPENSSL
    @pytest.mark.usefixtures("suspicious")
    def test_over_tls(self, product: Product, tmp_path: object) -> None:
        product.need_tls()
        cert, key = make_certificate(tmp_path)  # type: ignore[arg-type]
        with LocalRedis(tls_cert=cert, tls_key=key) as server, Nat(server.port) as nat:
            url = server.url.replace(str(server.port), str(nat.port))
            with closing(RedisTier(url, slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
                assert store(tier, KEYS, SLOT_BYTES) == [True] * 3
                nat.forget()

                assert tier.contains(KEYS, timeout_s=PATIENT_S) == [True] * 3


def _taken(wire: object, deadline: float, hedge: object) -> bool:
    """As `Wire.resume`, at a moment at which the end of the connection has not arrived yet."""
    wire._parser.deadline, wire._parser.is_silent, wire._hedge = deadline, True, hedge  # type: ignore[attr-defined]
    return True


class TestAge:
    pytestmark = ON_EACH_PRODUCT

    @pytest.mark.parametrize(("idle_max_s", "is_same"), [(1e-9, False), (60.0, True), (0.0, True)])
    def test_a_connection_is_used_again_up_to_its_age(self, idle_max_s: float, is_same: bool) -> None:
        with LocalRedis() as server:
            target = parse_redis_url(server.url)
            route = make_route(target, connections=1, connect_timeout_s=9.0, idle_max_s=idle_max_s)
            ((node, _),) = route.split([b"k"], time.monotonic() + 9)
            first, second = _ping(node), _ping(node)
            route.close()

        assert (first is second) is is_same

    def test_connections_are_kept_alive_and_bounded_by_the_system(self) -> None:
        with LocalRedis() as server, closing(RedisTier(server.url, slot_bytes=SLOT_BYTES, ttl_s=60)) as tier:
            tier.ping(timeout_s=TIMEOUT_S)
            (node,) = tier._route.nodes(time.monotonic() + 1)
            with node.lease(time.monotonic() + 1) as wire:
                link = wire.link
                assert link is not None
                assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                for option, value in KEEPALIVE.items():
                    assert link.getsockopt(socket.IPPROTO_TCP, option) == value


def _ping(node: Node) -> object:
    with node.lease(time.monotonic() + 9) as wire:
        assert wire.ask([(b"PING",)]) == [b"PONG"]
        return wire
