"""Every form in which servers tell where a node is."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.tiers.redis.slots import place, read_shards, read_slots

ASKED = ("10.0.0.1", 7000)
ID = b"07c37dfeb235213a872192d90877d0cd55635b91"


def slots(*master: Any) -> list[Any]:
    return [[0, 16383, list(master), [b"10.0.0.9", 7009, ID]]]


@pytest.mark.parametrize(
    ("master", "found"),
    [
        ((b"10.0.0.2", 7002), ("10.0.0.2", 7002)),  # Redis 3
        ((b"10.0.0.2", 7002, ID), ("10.0.0.2", 7002)),
        ((b"10.0.0.2", 7002, ID, []), ("10.0.0.2", 7002)),
        ((b"10.0.0.2", 7002, ID, [b"hostname", b"cache-2.example"]), ("10.0.0.2", 7002)),
        ((b"cache-2.example", 7002, ID, [b"ip", b"10.0.0.2"]), ("cache-2.example", 7002)),
        ((b"", 7002, ID, []), ("10.0.0.1", 7002)),  # a node that does not know itself
        ((None, 7002, ID, []), ("10.0.0.1", 7002)),  # unknown-endpoint
        ((None, 7002, ID, [b"ip", b"10.0.0.2"]), ("10.0.0.1", 7002)),  # NULL says: as you came, whatever the address
        ((b"?", 7002, ID, [b"ip", b"10.0.0.2"]), ("10.0.0.2", 7002)),
        ((b"?", 7002, ID, [b"hostname", b"cache-2.example"]), ("cache-2.example", 7002)),
        ((b"?", 7002, ID, []), ("10.0.0.1", 7002)),
        ((b"2001:db8::2", 7002, ID, []), ("2001:db8::2", 7002)),
        ((b"[2001:db8::2]", 7002, ID, []), ("2001:db8::2", 7002)),
        ((b"", 0, ID, []), ASKED),
    ],
)
def test_a_master_is_found_however_it_is_told(master: tuple[Any, ...], found: tuple[str, int]) -> None:
    assert read_slots(slots(*master), ASKED) == [(0, 16383, found)]


@pytest.mark.parametrize(
    ("host", "port", "found"),
    [
        ("10.0.0.2", 7002, ("10.0.0.2", 7002)),
        ("", 7002, ("10.0.0.1", 7002)),
        ("?", 7002, ("10.0.0.1", 7002)),
        ("::1", 7002, ("::1", 7002)),
        ("[::1]", 7002, ("::1", 7002)),
        ("cache-2.example", 7002, ("cache-2.example", 7002)),
    ],
)
def test_a_redirection_says_where_or_means_the_same_host(host: str, port: int, found: tuple[str, int]) -> None:
    assert place(host, port, ASKED) == found


def node(role: str, **fields: Any) -> list[Any]:
    flat: list[Any] = [b"id", ID]
    for name, value in ({"role": role.encode()} | fields).items():
        flat += [name.replace("_", "-").encode(), value]
    return flat


def test_shards_are_read_as_slots_are() -> None:
    reply = [
        [
            b"slots",
            [0, 99, 200, 299],
            b"nodes",
            [
                node("master", health=b"fail", endpoint=b"10.0.0.3", ip=b"10.0.0.3", port=7003),
                node("replica", health=b"online", endpoint=b"10.0.0.4", ip=b"10.0.0.4", port=7004),
                node("master", health=b"online", endpoint=b"?", ip=b"10.0.0.5", port=7005, tls_port=8005),
            ],
        ],
        [b"slots", [], b"nodes", [node("master", endpoint=b"10.0.0.6", port=7006)]],
        [b"slots", [100, 199], b"nodes", [node("master", endpoint=None, ip=b"10.0.0.7", tls_port=8007)]],
    ]

    assert read_shards(reply, ASKED, is_tls=False) == [
        (0, 99, ("10.0.0.5", 7005)),
        (100, 199, ("10.0.0.1", 8007)),
        (200, 299, ("10.0.0.5", 7005)),
    ]
    assert read_shards(reply, ASKED, is_tls=True)[0] == (0, 99, ("10.0.0.5", 8005))


@pytest.mark.parametrize(
    "reply", [[[0, 1]], [[0, 1, b"text"]], [[0, b"x", [b"h", 1]]], [[0, 1, [5, 1]]], [[0, 1, [b"h"]]]]
)
def test_a_table_that_is_none_is_an_error_and_no_crash(reply: Any) -> None:
    with pytest.raises((TypeError, ValueError, LookupError)):
        read_slots(reply, ASKED)
