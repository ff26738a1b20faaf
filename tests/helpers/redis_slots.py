"""Slots of a cluster moved from node to node, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.testing.redis_server import LocalRedis
from tests.helpers.redis_server import command
from tests.helpers.redis_topologies import node_id


def begin_move(slot: int, old: LocalRedis, new: LocalRedis) -> None:
    command(new, "CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(old))
    command(old, "CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(new))


def move_keys(names: Sequence[bytes], old: LocalRedis, new: LocalRedis) -> None:
    command(old, "MIGRATE", "127.0.0.1", new.port, "", 0, 60_000, "KEYS", *names)


def end_move(slot: int, old: LocalRedis, new: LocalRedis, nodes: Sequence[LocalRedis]) -> None:
    for node in (new, old, *(node for node in nodes if node not in (old, new))):
        command(node, "CLUSTER", "SETSLOT", slot, "NODE", node_id(new))


def move_slot(slot: int, old: LocalRedis, new: LocalRedis, nodes: Sequence[LocalRedis]) -> None:
    """As `redis-cli --cluster reshard` does, one key at a time."""
    begin_move(slot, old, new)
    while names := command(old, "CLUSTER", "GETKEYSINSLOT", slot, 1):
        move_keys(names, old, new)  # answers NOKEY for one that is gone by now
    end_move(slot, old, new, nodes)
