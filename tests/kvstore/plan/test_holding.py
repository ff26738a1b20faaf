"""Policies under a planner: a use is a pin there, and a page that comes back is another object."""

from __future__ import annotations

from eviction.s3fifo import S3Fifo
from eviction.sieve import Sieve
from eviction.ttl import Ttl
from kvstore.lab.engine import VirtualEngine
from kvstore.lab.replay import key_of
from kvstore.plan.records import PlanSettings
from kvstore.plan.state import Page
from kvstore.policies import make_policy


def serve(engine: VirtualEngine, *blocks: int) -> int:
    """One request of these blocks; how many of them were hits."""
    engine.now += 1.0
    num_hits = engine.serve(engine.request([key_of(block) for block in blocks])).num_blocks
    engine.planner.check()
    return num_hits


def engine_with(policy: Ttl[Page], num_slots: int) -> VirtualEngine:
    return VirtualEngine(16, PlanSettings(num_slots), policy)


def test_sieve_keeps_what_was_loaded_in_its_place_where_lru_makes_it_the_newest() -> None:
    hits = {}
    for name in ("lru", "sieve"):
        engine = engine_with(make_policy(name), 4)
        for block in (1, 2, 3, 4, 1, 5, 6, 7, 8):
            serve(engine, block)
        hits[name] = [serve(engine, block) for block in (1, 5)]

    # The hand passed 1 once and goes on with what lies ahead; for recency 1 is older than all that came after.
    assert hits == {"lru": [0, 0], "sieve": [1, 0]}


def test_sieve_marks_a_loaded_page_and_does_not_move_it() -> None:
    policy: Sieve[Page] = Sieve()
    engine = engine_with(Ttl(policy), 8)
    for block in (1, 2, 3, 1):
        serve(engine, block)

    assert [page.block.key for page in policy.members()] == [key_of(block) for block in (1, 2, 3)]


def test_a_page_that_s3fifo_threw_out_is_known_when_it_comes_back() -> None:
    policy: S3Fifo[Page] = S3Fifo()
    engine = engine_with(Ttl(policy), 10)
    for block in range(10):
        serve(engine, block)
    serve(engine, 100)  # throws 0 out
    assert serve(engine, 0) == 0  # computed anew: another object, of the same name

    for block in range(200, 230):
        serve(engine, block)

    assert serve(engine, 0) == 1


def test_a_promise_of_an_operator_holds_a_page_in_every_policy() -> None:
    for name in ("lru", "sieve", "s3fifo"):
        engine = engine_with(make_policy(name), 6)
        request = engine.request([key_of(1)])
        serve(engine, 1)
        assert engine.planner.pin(request, engine.now) == 1

        for block in range(10, 30):
            serve(engine, block)

        assert serve(engine, 1) == 1
