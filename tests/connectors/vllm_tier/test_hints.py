"""Hints in the seat of a secondary tier: what is done on the tiers, and what is answered. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from connectors.vllm_tier.hints import MAX_LATER, MAX_NAMED, RequestHints
from connectors.vllm_tier.lookup import LookupAnswer
from tests.helpers.hints import envelope
from tests.helpers.tier_world import KEYS, TierWorld, key, tier_worlds
from tests.helpers.waiting import wait_until

HASHES = [one[:-4].hex() for one in KEYS]


@pytest.fixture
def world() -> Iterator[TierWorld]:
    yield from tier_worlds()


def say(world: TierWorld, kind: str, **payload: Any) -> RequestHints | None:
    return world.core.hints.came([envelope((kind, payload))])


def counts(world: TierWorld) -> dict[str, int]:
    return {status.value: number for status, number in world.core.hints.counts.items()}


def settle(world: TierWorld) -> None:
    """Let steps go by until nothing is under way."""

    def is_still() -> bool:
        world.core.end_step()
        world.core.take_done()
        return not world.core.mover.num_open and not world.core.hints.is_forgetting

    wait_until(is_still, "something is under way", poll_s=0.001)


def oldest_first(world: TierWorld) -> list[str]:
    """Names of the chunks on disk in the order in which they would be evicted."""
    names = {world.core._chunks.name(one): one[:1].decode() for one in KEYS}
    return [names[page.key] for page in world.disk.inner.scan()]


def test_retained_chunks_are_the_last_to_be_evicted(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])

    say(world, "retain", block_hashes=HASHES[:2], ttl_s=300)
    settle(world)

    assert oldest_first(world) == ["c", "d", "a", "b"]
    assert counts(world) == {"accepted": 1}


def test_a_part_of_the_prompt_is_meant_by_its_tokens(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])

    say(world, "retain", block_hashes=HASHES, start=1, end=2)  # a chunk is one token here
    settle(world)

    assert oldest_first(world) == ["a", "c", "d", "b"]


def test_retained_chunks_live_as_long_as_they_are_retained(world: TierWorld) -> None:
    world.save(KEYS[:2], [0, 1])  # 100 s in Redis

    say(world, "retain", block_hashes=HASHES[:1], ttl_s=1000)
    settle(world)

    ends = sorted(page.meta.expires_at - world.wall() for page in world.redis.inner.scan())
    assert ends == [100.0, 1000.0]


def test_a_release_ends_what_was_retained(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    say(world, "retain", block_hashes=HASHES)
    assert world.core._touches.num_retained == 4

    say(world, "release", block_hashes=HASHES[:3])

    assert world.core._touches.num_retained == 1


def test_what_is_retained_ends_by_itself(world: TierWorld) -> None:
    say(world, "retain", block_hashes=HASHES, ttl_s=10)
    settle(world)
    world.wall.now += 11
    world.core._touches._interval_s = 0.0

    settle(world)

    assert world.core._touches.num_retained == 0


def test_a_hint_about_its_own_prompt_waits_for_the_requests_end(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    asked = say(world, "retain", start=2)
    assert asked is not None
    asked.saw(KEYS)

    world.core.hints.finished(asked, lambda one: KEYS.index(one) + 1)
    settle(world)

    assert oldest_first(world) == ["a", "b", "c", "d"]
    assert world.core._touches.num_retained == 2
    assert counts(world) == {"deferred": 1}


def test_forgotten_chunks_are_gone_from_all_tiers(world: TierWorld) -> None:
    world.save([*KEYS, key("a", 1)], [0, 1, 2, 3, 0])
    assert world.look(KEYS) == [LookupAnswer.HIT] * 4

    say(world, "forget", block_hashes=HASHES[:2])
    settle(world)

    assert world.look(KEYS) == [LookupAnswer.MISS] * 2 + [LookupAnswer.HIT] * 2
    assert len(list(world.redis.inner.scan())) == 3
    assert counts(world) == {"clipped": 1}


def test_a_tier_that_does_not_delete_is_asked_again(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.redis.fail(only=("delete",))
    say(world, "forget", block_hashes=HASHES)
    wait_until(lambda: (world.core.end_step(), world.redis.calls["delete"])[1], poll_s=0.001)

    world.redis.recover()
    wait_until(lambda: (world.core.end_step(), not list(world.redis.inner.scan()))[1], poll_s=0.001)


def test_what_is_being_saved_is_forgotten_when_it_is(world: TierWorld) -> None:
    world.disk.hang(only=("write_from",))
    world.core.jobs.save(1, KEYS, [0, 1, 2, 3])
    world.disk.wait_for_hanging()
    say(world, "forget", block_hashes=HASHES)
    world.core.end_step()
    assert world.disk.calls["delete"] == 0

    world.disk.recover()
    settle(world)

    assert not list(world.disk.inner.scan())


def test_a_prefetch_asks_the_tiers_before_a_request_does(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])

    say(world, "prefetch", block_hashes=HASHES)
    settle(world)

    assert [world.core.lookup(one) for one in KEYS] == [LookupAnswer.HIT] * 4
    assert say(world, "prefetch") is None
    assert counts(world) == {"clipped": 1, "rejected": 1}


@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        ("pin", {}, "rejected"),
        ("demote", {"block_hashes": HASHES}, "rejected"),
        ("share", {}, "accepted"),
        ("retain", {"tokens": [1, 2, 3]}, "rejected"),
        ("retain", {"block_hashes": HASHES * (MAX_NAMED // 4 + 1)}, "rejected"),
        ("retain", {"block_hashes": HASHES, "ttl_s": -1}, "rejected"),
        ("retain", {"block_hashes": ["zz"]}, "rejected"),
        ("retain", {"block_hashes": HASHES, "ttl_s": 1e8}, "clipped"),
        ("evaporate", {}, "ignored"),
    ],
)
def test_what_cannot_be_done_here_is_answered(world: TierWorld, kind: str, payload: Any, status: str) -> None:
    assert say(world, kind, **payload) is None

    assert counts(world) == {status: 1}


def test_all_hints_of_a_request_together_have_a_bound(world: TierWorld) -> None:
    prefetch = envelope(*[("prefetch", {"block_hashes": HASHES * (MAX_NAMED // 8)})] * 3)
    own = envelope(*[("retain", {})] * (MAX_LATER + 1))

    asked = world.core.hints.came([prefetch, own])

    assert asked is not None
    assert len(asked.actions) == MAX_LATER
    assert counts(world) == {"clipped": 2, "rejected": 2, "deferred": MAX_LATER}
    assert world.core.hints.came([prefetch]) is None  # each request has it anew
    assert counts(world)["clipped"] == 4


@pytest.mark.parametrize("said", [7, "{", b"\xff", {"actions": 7}, {}, object(), {"a": "b"}, [], "[" * 100_000])
def test_what_is_no_message_is_counted(world: TierWorld, said: object) -> None:
    assert world.core.hints.came([said]) is None

    assert counts(world) == {"rejected": 1}
