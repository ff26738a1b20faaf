from __future__ import annotations

import pytest

from kvstore.errors import RequestError
from kvstore.plan.records import CutReason, RequestOptions
from kvstore.store import LocalStore
from tests.helpers.stores import BLOCK, prompt


def test_growing_a_request_gives_the_keys_of_the_whole_prompt(store: LocalStore) -> None:
    tokens = prompt(6, tail=5)

    request = store.request(tokens[:20])
    store.extend(request, tokens[20:23])
    store.extend(request, tokens[23:])

    assert request.keys == store.request(tokens).keys
    assert request.num_tokens == len(tokens)


def test_tenants_share_no_key(store: LocalStore) -> None:
    tokens = prompt(3)

    ours = store.request(tokens, RequestOptions(tenant="a")).keys
    theirs = store.request(tokens, RequestOptions(tenant="b")).keys

    assert not set(ours) & set(theirs)


def test_hashes_of_an_engine_are_bound_to_the_namespace(store: LocalStore) -> None:
    hashes = [bytes([i]) * 32 for i in range(3)]

    request = store.request_from_hashes(hashes, 3 * BLOCK + 1)

    assert len(request.keys) == 3
    assert not set(request.keys) & set(hashes)


def test_fewer_tokens_than_the_hashes_cover_are_refused(store: LocalStore) -> None:
    with pytest.raises(RequestError, match="num_tokens is 40"):
        store.request_from_hashes([b"x" * 32] * 3, 40)


def test_a_prompt_without_a_full_block_is_a_miss_that_says_so(store: LocalStore) -> None:
    match = store.lookup(store.request(prompt(1, tail=0)))  # its last token must be computed

    assert (match.num_blocks, match.cut) == (0, CutReason.TOO_SHORT)
