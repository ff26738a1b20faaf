"""What chunks are called in the tiers, how long they live, and what is told of their use. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from connectors.vllm_tier.lookup import LookupAnswer
from tests.helpers.tier_world import KEYS, TierWorld, key, tier_worlds
from tests.helpers.waiting import wait_until


@pytest.fixture
def world() -> Iterator[TierWorld]:
    yield from tier_worlds()


def test_another_namespace_shares_no_chunk(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    other = world.open(root=b"other model")

    assert world.look(KEYS, other) == [LookupAnswer.MISS] * 4
    other.mover.poll()
    other.mover._mover.close(5.0)  # the tiers are the world's


def test_groups_of_one_block_are_chunks_of_their_own(world: TierWorld) -> None:
    world.save([key("a", 0)], [0])

    assert world.look([key("a", 0), key("a", 1)]) == [LookupAnswer.HIT, LookupAnswer.MISS]


def test_pages_are_stored_with_the_time_to_live_of_their_tier(world: TierWorld) -> None:
    world.save(KEYS[:1], [0])

    (on_disk,), (on_redis,) = list(world.disk.inner.scan()), list(world.redis.inner.scan())
    assert on_disk.meta.expires_at == 0
    assert on_redis.meta.expires_at == world.wall() + 100.0


def test_a_loaded_chunk_is_touched_tail_first_and_once_in_an_interval(world: TierWorld) -> None:
    world.save(KEYS, [0, 1, 2, 3])
    world.look(KEYS)

    for _ in range(3):
        world.load(KEYS[:2], [10, 11])
        world.core.end_step()
    world.look([key("x")])  # lanes are first come, first served: the touch went before
    wait_until(lambda: (world.core.take_done(), not world.core.mover.num_open)[1])

    assert world.disk.calls["touch"] == 1
    order = [page.key for page in world.disk.inner.scan()]
    assert order == [world.core._chunks.name(one) for one in (KEYS[2], KEYS[3], KEYS[1], KEYS[0])]
