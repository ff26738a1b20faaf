"""Claims in Redis: machines tell each other about blocks that they are computing.

    first key of the page | ":claim"    ->    token of who computes it, with a deadline

A claim is taken while its page is not there yet (SET with PX), renewed by whoever holds it, and given back by comparing
the token; a machine that dies leaves keys that expire. The scripts work on many keys at once, so that of two machines
that claim the same path at the same moment one gets all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvstore.tiers.redis.connection import RedisConnection
from kvstore.tiers.redis.refusal import checked, is_moving

ENDING = b":claim"  # no other part of a page has a name of that length
KEYS_AT_ONCE = 512  # per script: about a millisecond of the server's time

# Stops at a first key that another has: who is refused there waits, and must not hold what comes after it.
TAKE = b"""
local held = {}
for i, key in ipairs(KEYS) do
  local holder = redis.call('GET', key)
  if not holder or holder == ARGV[1] then
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
    held[i] = 1
  elseif i == 1 then
    return held
  else
    held[i] = 0
  end
end
return held
"""
GIVE_BACK = b"""
local given = {}
for i, key in ipairs(KEYS) do
  given[i] = redis.call('GET', key) == ARGV[1] and redis.call('DEL', key) or 0
end
return given
"""


class RedisClaims:
    """Takes and gives back claims. Thread rule as the tier's.

    on_each_node: on_each_node(names, timeout_s, work, all_nodes=True) calls work(wire, indexes of its names) for each
                  node (`redis_calls.Calls`).
    is_cluster:   a script may only name keys of one slot there, so each key has a call of its own.
    """

    def __init__(self, on_each_node: Callable[..., None], *, is_cluster: bool) -> None:
        self._on_each_node = on_each_node
        self._at_once = 1 if is_cluster else KEYS_AT_ONCE

    def take(self, heads: Sequence[bytes], token: bytes, lease_s: float, timeout_s: float) -> list[bool]:
        """Claim or renew the pages with these first keys; all False if the first is another's.

        One round trip, two for many. Raises TierRefused for a server that takes no claims, which is no reason to store
        no pages there.
        """
        deadline = time.monotonic() + timeout_s
        args = (token, max(1, int(lease_s * 1000)))
        held = self._run(TAKE, heads[: self._at_once], args, timeout_s)
        rest = heads[self._at_once :]
        if rest and held[0]:
            held += self._run(TAKE, rest, args, deadline - time.monotonic())
        return held + [False] * (len(heads) - len(held))

    def give_back(self, heads: Sequence[bytes], token: bytes, timeout_s: float) -> None:
        """End the token's own claims."""
        self._run(GIVE_BACK, heads, (token,), timeout_s)

    def _run(
        self, script: bytes, heads: Sequence[bytes], args: tuple[bytes | int, ...], timeout_s: float
    ) -> list[bool]:
        """Run a script over the claims on pages, so many at once; for which of them it said 1.

        Of a slot that is on its way to another node nobody can say who claims what is in it. Such a page counts as
        claimed: at worst two machines compute it, and neither waits for a third that does not.
        """
        names = [head + ENDING for head in heads]
        said = [False] * len(names)

        def run(wire: RedisConnection, indexes: list[int]) -> None:
            batches = [indexes[at : at + self._at_once] for at in range(0, len(indexes), self._at_once)]
            commands = [(b"EVAL", script, len(batch), *(names[i] for i in batch), *args) for batch in batches]
            for batch, reply in zip(batches, wire.ask(commands), strict=True):
                checked(reply, f"{wire.where} takes no claims", wire.account)
                answers = [1] * len(batch) if is_moving(reply) else reply
                for i, answer in zip(batch, answers, strict=False):
                    said[i] = answer == 1

        self._on_each_node(names, timeout_s, run, all_nodes=True)
        return said
