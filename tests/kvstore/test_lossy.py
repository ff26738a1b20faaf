"""Stores whose tiers lose something: who gets such pages, and who does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.build import attach_tier, open_store
from kvstore.codecs.loss import Loss, loss_of
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from kvstore.opening import lossy_codec
from kvstore.plan.records import Request, RequestOptions
from kvstore.service.protocol.namespaces import layout_from_json, layout_to_json
from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.kv_pages import kv_page, layout_with, plain_axes
from tests.helpers.stores import PATIENCE, namespace

LAYOUT = layout_with(plain_axes(4, 4, 16, 64))
PAGE_BYTES = LAYOUT.stored_bytes(0)
TOKENS = np.arange(4 * 16 + 1)
EXACT = RequestOptions(exact=True)


def open_with(layout: Layout = LAYOUT, *, store: dict[str, Any] | None = None, **tiers: dict[str, Any]) -> LocalStore:
    config = Config(
        host={"capacity_bytes": 16 * layout.slot_bytes, "huge_pages": False},
        store={**PATIENCE, **(store or {})},
        **tiers,
    )
    return open_store(config, layout, namespace(layout, hash=config.store.hash))


def save(store: LocalStore, request: Request) -> list[bytes]:
    """Save pages of their own; return them."""
    pages = [kv_page(PAGE_BYTES, seed) for seed in range(len(request.keys))]
    lease = store.prepare_save(request, 0, len(request.keys))
    for page in lease.pages:
        store.slots.array(page.slot)[:PAGE_BYTES] = np.frombuffer(pages[page.block], np.uint8)
    store.complete(lease)
    store.flush(30)
    return pages


def loaded(store: LocalStore, request: Request) -> list[bytes]:
    match = store.wait_lookup(request)
    lease = store.prepare_load(request, match.num_blocks)
    status = store.wait(lease, 30)
    pages = [bytes(store.slots.array(page.slot)[:PAGE_BYTES]) for page in lease.pages if page.block < status.num_blocks]
    store.complete(lease)
    return pages


def error_of(pages: list[bytes], others: list[bytes]) -> float:
    there, back = (
        (np.frombuffer(b"".join(one), "<u2").astype(np.uint32) << 16).view(np.float32) for one in (pages, others)
    )
    return float(np.linalg.norm(there - back) / np.linalg.norm(there))


@pytest.mark.parametrize("codec", ["near", "compact", "small"])
def test_a_reopened_disk_gives_pages_back_with_the_loss_of_its_codec(tmp_path: Path, codec: str) -> None:
    disk = {"path": tmp_path / "disk", "capacity_bytes": 8 * PAGE_BYTES, "codec": codec}
    with open_with(disk=disk) as store:
        request = store.request(TOKENS)
        pages = save(store, request)
        assert {loss_of(key).word for key in request.keys} == {codec}

    with open_with(disk=disk) as store:
        assert store.stats()["capacity_pages"]["disk"] > 8  # slots are of what pages become
        back = loaded(store, store.request(TOKENS))
        assert (len(back), back != pages) == (4, True)
        assert error_of(pages, back) < 0.2
        assert store.stats()["tier_events"]["disk"]["lossy_read"] == 4
        assert loaded(store, store.request(TOKENS, EXACT)) == []


def test_a_request_that_refuses_loss_finds_no_lossy_page_in_host_memory_or_below(tmp_path: Path) -> None:
    disk = {"path": tmp_path / "disk", "capacity_bytes": 32 * PAGE_BYTES, "codec": "near"}
    with open_with(disk=disk) as store:
        save(store, store.request(TOKENS))

        refusing = store.request(TOKENS, EXACT)
        assert loaded(store, refusing) == []
        pages = save(store, refusing)
        assert loaded(store, store.request(TOKENS, EXACT)) == pages

        grown = store.request(TOKENS[:40], EXACT)
        store.extend(grown, TOKENS[40:])
        assert grown.keys == refusing.keys
        grown = store.request(TOKENS[:40])
        store.extend(grown, TOKENS[40:])
        assert grown.keys == store.request(TOKENS).keys != refusing.keys


def test_pages_without_loss_push_none_off_a_disk_whose_slots_are_too_small_for_them(tmp_path: Path) -> None:
    disk = {"path": tmp_path / "disk", "capacity_bytes": 5 * PAGE_BYTES, "codec": "small"}
    with open_with(disk=disk) as store:
        save(store, store.request(TOKENS))
        save(store, store.request(TOKENS + 1000))
        for first in range(2000, 6000, 1000):
            save(store, store.request(TOKENS + first, EXACT))

        stats = store.stats()
        assert (stats["pages"]["disk"], stats["evicted_pages"]["disk"], stats["owed_pages"]["disk"]) == (8, 0, 0)
        assert store.flush(30)

    with open_with(disk=disk) as store:
        assert len(loaded(store, store.request(TOKENS))) == len(loaded(store, store.request(TOKENS + 1000))) == 4


def test_a_tier_that_loses_more_than_names_tell_is_not_attached(tmp_path: Path) -> None:
    disk = {"path": tmp_path / "disk", "capacity_bytes": 8 * PAGE_BYTES, "codec": "small"}
    config = Config(disk=disk)
    with open_with() as store, pytest.raises(ConfigError, match=r"disk\.codec is 'small', but .* take exact pages"):
        attach_tier(store, config, "disk")

    assert not (tmp_path / "disk").exists()


def test_exact_and_lossless_keep_the_names_of_today(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    disk = {"path": tmp_path / "disk", "capacity_bytes": 32 * PAGE_BYTES}
    with open_with(disk=disk) as store:
        request = store.request(TOKENS)
        pages = save(store, request)
        assert store.loss is Loss.EXACT

    with open_with(disk={**disk, "codec": "lossless"}) as store:
        assert store.request(TOKENS).keys == request.keys
        assert loaded(store, store.request(TOKENS)) == pages
        others = store.request(TOKENS + 1)
        save(store, others)

    with open_with(disk=disk) as store:  # and back: a page of any codec is read
        assert loaded(store, store.request(TOKENS + 1)) == pages


def test_a_daemon_is_told_what_lies_where_and_an_older_client_tells_nothing() -> None:
    told = layout_to_json(LAYOUT)
    assert layout_from_json(told) == LAYOUT

    del told["groups"][0]["axes"]
    older = layout_from_json(told)
    assert older.groups[0].axes == ()
    assert older.fingerprint == LAYOUT.fingerprint  # what is stored is found by both


def test_pages_from_an_engines_hashes_carry_the_class_too(tmp_path: Path) -> None:
    disk = {"path": tmp_path / "disk", "capacity_bytes": 32 * PAGE_BYTES, "codec": "small"}
    with open_with(disk=disk) as store:
        request = store.request_from_hashes([b"a" * 32], 17)
        store.extend_hashes(request, [b"b" * 32], 33)

        assert [loss_of(key) for key in request.keys] == [Loss.SMALL] * 2


def test_a_lossy_tier_needs_names_that_can_tell_it_and_a_layout_that_is_told(tmp_path: Path) -> None:
    disk = {"path": tmp_path / "disk", "capacity_bytes": 32 * PAGE_BYTES, "codec": "near"}
    opaque = Layout(16, (LAYOUT.groups[0].__class__(LAYOUT.groups[0].kind, (0,), PAGE_BYTES),), "test", "bfloat16")

    with pytest.raises(ConfigError, match=r"disk\.codec is 'near': .* needs store\.hash 'sha256', not 'xxh3_128'"):
        open_with(disk=disk, store={"hash": "xxh3_128"})
    with pytest.raises(ConfigError, match="does not tell what lies where"):
        open_with(opaque, disk=disk)


@pytest.mark.redis
@pytest.mark.parametrize("codec", ["near", "small"])
def test_machines_share_lossy_pages_through_redis_and_exact_readers_do_not_see_them(codec: str) -> None:
    with LocalRedis() as server:
        lossy, exact = ({"url": server.url, "codec": one} for one in (codec, "lossless"))
        with open_with(redis=lossy) as store:
            pages = save(store, store.request(TOKENS))
            kept = save(store, store.request(TOKENS + 7, EXACT))
        with open_with(redis=lossy) as store:
            back = loaded(store, store.request(TOKENS))
            assert 0 < error_of(pages, back) < 0.2
            assert loaded(store, store.request(TOKENS + 7, EXACT)) == kept
        with open_with(redis=exact) as store:
            assert loaded(store, store.request(TOKENS)) == []
            assert loaded(store, store.request(TOKENS + 7)) == kept  # what was stored without loss is everybody's


def test_an_engine_hears_which_of_its_own_tiers_loses_most(tmp_path: Path) -> None:
    tiers = {"disk": {"path": tmp_path, "codec": "near"}, "redis": {"url": "redis://localhost", "codec": "small"}}

    assert lossy_codec(Config(**tiers)) == "small"
    assert lossy_codec(Config(disk={"path": tmp_path, "codec": "lossless"})) == ""
    assert lossy_codec(Config(**tiers, service={"url": "unix:///run/kv.sock"})) == ""
