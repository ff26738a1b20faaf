"""The table of a cluster: which master has which slots, read from CLUSTER SLOTS, CLUSTER SHARDS and redirections.

Where a node is may be told in more ways than one:

    10.0.0.7, 2001:db8::7, [2001:db8::7]    an address; the servers write IPv6 without brackets
    cache-1.example                         a name (cluster-announce-hostname, preferred endpoint type hostname)
    NULL or empty                           the node that was asked (unknown-endpoint; a node that does not know itself)
    ?                                       a node without a name, where names are preferred: see the metadata

The port is that of the way we asked in: servers give clients that speak TLS their TLS ports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvstore.tiers.redis.url import Address

SlotRange = tuple[int, int, Address]  # first slot, last slot, master

UNKNOWN_HOST = "?"


def read_slots(reply: Any, asked: Address) -> list[SlotRange]:
    """The ranges of a reply to CLUSTER SLOTS, sorted. Raises TypeError, ValueError or LookupError for anything else.

    asked: the node that answered.
    """
    ranges = []
    for first, last, master, *_ in reply:
        endpoint, port, *more = master
        ranges.append((int(first), int(last), place(endpoint, port, asked, _metadata(more[1:]))))
    return sorted(ranges)


def read_shards(reply: Any, asked: Address, *, is_tls: bool) -> list[SlotRange]:
    """The same from a reply to CLUSTER SHARDS (Redis 7 and later)."""
    ranges = []
    for shard in reply:
        fields = _pairs(shard)
        slots = fields["slots"]
        nodes = [_pairs(node) for node in fields["nodes"]]
        masters = [node for node in nodes if _text(node["role"]) == "master"]
        if not masters or not slots:
            continue
        # A shard whose master has failed still names it; one that is online is the new one.
        node = next((one for one in masters if _text(one.get("health", b"online")) == "online"), masters[0])
        port = (node.get("tls-port") if is_tls else None) or node.get("port") or node.get("tls-port")
        found = place(node.get("endpoint"), port, asked, {"ip": _text(node.get("ip") or b"")})
        ranges += [(int(slots[i]), int(slots[i + 1]), found) for i in range(0, len(slots), 2)]
    return sorted(ranges)


def place(endpoint: Any, port: Any, asked: Address, metadata: dict[str, str] | None = None) -> Address:
    """The address of a node, from the endpoint that `asked` told of it."""
    host = _text(endpoint or b"").strip("[]")
    if host == UNKNOWN_HOST:
        host = (metadata or {}).get("ip", "") or (metadata or {}).get("hostname", "")
    return (host if host and host != UNKNOWN_HOST else asked[0]), int(port) or asked[1]


def _metadata(more: Sequence[Any]) -> dict[str, str]:
    """The fields behind a node's id: pairs in a list, or a map as a list (Redis 7 and later)."""
    flat = more[0] if more and isinstance(more[0], list) else []
    return {_text(name): _text(value or b"") for name, value in _twos(flat)}


def _pairs(flat: Sequence[Any]) -> dict[str, Any]:
    return {_text(name): value for name, value in _twos(flat)}


def _twos(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    if isinstance(flat, (bytes, str)):
        raise TypeError(f"expected a list, got {flat!r}")
    return zip(flat[::2], flat[1::2], strict=True)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise TypeError(f"expected a string, got {value!r}")
    return value.decode()
