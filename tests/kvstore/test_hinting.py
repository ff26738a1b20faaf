"""Hints to a store: from the message to pages, in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.base import HintStatus
from kvstore.errors import StoreClosed
from kvstore.plan.records import RequestOptions
from kvstore.requests import payer_of
from kvstore.store import LocalStore
from tests.helpers.hints import envelope
from tests.helpers.stores import BLOCK, PAGE_BYTES, load, memory_tier, prompt, save, store_over, use
from tests.helpers.waiting import WAIT_S, wait_until

ACCEPTED, DEFERRED, REJECTED = HintStatus.ACCEPTED, HintStatus.DEFERRED, HintStatus.REJECTED


@pytest.fixture
def tiered() -> Iterator[LocalStore]:
    """A store of 64 slots over a tier of 128 pages."""
    with store_over([memory_tier()]) as store:
        yield store
        store.check()


def one(store: LocalStore, kind: str, request: Any = None, options: Any = None, **payload: Any) -> Any:
    """The outcome of a hint of one action."""
    (outcome,) = store.hint(envelope((kind, payload)), request, options=options)
    return outcome


def test_a_pin_by_tokens_keeps_its_prefix_while_others_come(store: LocalStore) -> None:
    use(store, prompt(20, seed=1))

    outcome = one(store, "pin", tokens=prompt(20, seed=1).tolist(), ttl_s=60)
    use(store, prompt(60, seed=2))

    assert (outcome.action_id, outcome.status, outcome.tokens) == ("0", ACCEPTED, 20 * BLOCK)
    assert store.lookup(store.request(prompt(20, seed=1))).num_blocks == 20
    stats = store.stats()
    assert stats["kept_bytes"] == {"": 20 * PAGE_BYTES}
    assert stats["hints"] == {"pin": {"accepted": 1}}


def test_a_range_of_tokens_means_the_blocks_that_it_touches(store: LocalStore) -> None:
    use(store, prompt(6))

    outcome = one(store, "pin", tokens=prompt(6), start=BLOCK + 3, end=2 * BLOCK + 1)

    assert outcome.tokens == 2 * BLOCK


def test_a_hint_with_a_request_is_about_its_prompt(store: LocalStore) -> None:
    request = store.request(prompt(10, seed=1), RequestOptions(session="s"))

    assert one(store, "pin", request).status is DEFERRED
    save(store, request)
    store.keep.finished(request)
    use(store, prompt(60, seed=2))

    assert store.lookup(store.request(prompt(10, seed=1))).num_blocks == 10
    assert [kept.holder for kept in store.admin.kept()] == ["session s"]
    again = store.request(prompt(10, seed=1))
    assert one(store, "release", again, session="s").tokens == 10 * BLOCK
    assert store.stats()["kept_pages"] == 0


@pytest.mark.parametrize(("last_turn", "expected"), [(False, 20), (True, 0)])
def test_what_a_session_retained_is_not_retained_after_its_last_turn(
    store: LocalStore, last_turn: bool, expected: int
) -> None:
    for turn in range(2):
        request = store.request(prompt(20, seed=1), RequestOptions(session="s"))
        if not turn:
            one(store, "retain", request, ttl_s=60)
        save(store, request)
        store.keep.finished(request, last_turn=last_turn and turn == 1)

    for other in range(2, 5):
        use(store, prompt(30, seed=other))

    assert store.lookup(store.request(prompt(20, seed=1))).num_blocks == expected


def test_a_hint_without_prompt_or_request_is_rejected(store: LocalStore) -> None:
    assert "came with no request" in one(store, "pin").reason


def test_a_tenant_cannot_name_the_blocks_of_another(store: LocalStore) -> None:
    theirs = RequestOptions(tenant="theirs")
    use(store, prompt(10), theirs)
    request = store.request(prompt(10), theirs)

    for kind in ("pin", "retain", "prefetch", "release"):
        for payload in ({"tokens": prompt(10)}, {"block_hashes": [key.hex() for key in request.keys]}):
            assert one(store, kind, options=RequestOptions(tenant="ours"), **payload).status is REJECTED
    one(store, "forget", options=RequestOptions(tenant="ours"), tokens=prompt(10))
    one(store, "demote", options=RequestOptions(tenant="ours"), tokens=prompt(10))

    assert store.lookup(request).num_blocks == 10
    assert one(store, "pin", options=theirs, tokens=prompt(10)).tokens == 10 * BLOCK
    assert list(store.stats()["kept_bytes"]) == [payer_of("theirs")]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": [1, 2]}, "shorter than a block"),
        ({"tokens": [1.5] * 40}, ""),
        ({"tokens": ["a"] * 40}, ""),
        ({"tokens": [-1] * 40}, ""),
        ({"tokens": [[1]] * 40}, ""),
        ({"tokens": list(range(40)), "start": 64}, "start"),
        ({"block_hashes": ["00" * 32] * 70_000}, "tokens; one action may name"),
    ],
)
def test_what_is_no_prompt_is_rejected_and_counted(store: LocalStore, payload: dict[str, Any], reason: str) -> None:
    outcome = one(store, "pin", **payload)

    assert outcome.status is REJECTED
    assert reason in outcome.reason
    assert store.stats()["hints"] == {"pin": {"rejected": 1}}
    assert store.stats()["kept_pages"] == 0


def test_a_demoted_prefix_is_loaded_from_below_with_the_same_bytes(tiered: LocalStore) -> None:
    use(tiered, prompt(10))

    outcome = one(tiered, "demote", tokens=prompt(10))

    wait_until(lambda: tiered.stats()["slots"]["resident"] == 0)
    assert outcome.status in (ACCEPTED, DEFERRED)
    request = tiered.request(prompt(10))
    assert load(tiered, request)[1].by_tier == {"memory": 10}


def test_a_forgotten_prefix_is_deleted_below(tiered: LocalStore) -> None:
    use(tiered, prompt(10))
    assert tiered.flush(WAIT_S)

    assert one(tiered, "forget", tokens=prompt(10)).tokens == 10 * BLOCK

    assert tiered.flush(WAIT_S)
    assert tiered.stats()["pages"]["memory"] == 0


def test_a_closed_store_says_so() -> None:
    store = store_over([])
    store.close()

    with pytest.raises(StoreClosed):
        store.hint(envelope(("pin", {"tokens": list(range(40))})))


def test_a_thousand_random_messages_change_no_byte_and_raise_nothing(tiered: LocalStore) -> None:
    chance = random.Random(1)
    prompts = [prompt(chance.randint(1, 12), seed=seed) for seed in range(12)]
    kinds = ["pin", "retain", "prefetch", "demote", "release", "forget", "share", "teleport"]
    extra: list[dict[str, Any]] = [
        {},
        {"ttl_s": 60},
        {"ttl_s": -1},
        {"priority": 90},
        {"start": 20, "end": 90},
        {"x": 1},
    ]
    for round_ in range(1000):
        tokens = chance.choice(prompts)
        payload = chance.choice(extra) | ({"tokens": tokens} if chance.random() < 0.7 else {})
        request = tiered.request(tokens) if chance.random() < 0.3 else None
        tiered.hint(envelope((chance.choice(kinds), payload)), request)
        if round_ % 20 == 0:
            request = tiered.request(chance.choice(prompts))
            load(tiered, request)  # compares every byte
            save(tiered, request)
            tiered.keep.finished(request)
    keeper_pages = tiered.stats()["kept_pages"]

    assert keeper_pages <= 32
    assert sum(sum(counts.values()) for counts in tiered.stats()["hints"].values()) == 1000
