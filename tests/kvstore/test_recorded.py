"""A store with a recording: what it is asked is written down, and a replay of that at its size hits what it hit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvstore import Config, open_store
from kvstore.config.sources import Setting
from kvstore.lab.replay import play
from kvstore.lab.setup import Setup
from kvstore.lab.traces import read_trace
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.ended import ABANDONED
from kvstore.plan.records import RequestOptions
from kvstore.store import LocalStore
from radix.namespace import Namespace

BLOCK, PAGE = 16, 4096
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), PAGE),), "made-up", "uint8")
NAMESPACE = Namespace("made-up", "r", "uint8", LAYOUT.fingerprint, BLOCK)


def open_recorded(record: Path | None, num_slots: int) -> LocalStore:
    values: dict[str, Any] = {"store.block_size": BLOCK, "host.capacity_bytes": num_slots * LAYOUT.slot_bytes}
    if record is not None:
        values["store.record"] = record
    config = Config.load(None, **{name: Setting(value, "test") for name, value in values.items()})
    return open_store(config, LAYOUT, NAMESPACE)


def serve(store: LocalStore, tokens: list[int], session: str, reason: str = "stop") -> None:
    request = store.request(tokens, RequestOptions(session=session))
    match = store.lookup(request)
    if match.num_blocks:
        store.complete(store.prepare_load(request, match.num_blocks))
    if len(request.keys) > match.num_blocks:
        store.complete(store.prepare_save(request, match.num_blocks, len(request.keys) - match.num_blocks))
    store.keep.finished(request, finish_reason=reason)


def test_a_replay_of_what_was_recorded_hits_what_the_store_hit(tmp_path: Path) -> None:
    draw, chats = random.Random(7), {number: [number] for number in range(12)}
    with open_recorded(tmp_path / "asked.kvr", 200) as store:
        for _ in range(400):
            chat = draw.randrange(12)
            if len(chats[chat]) > 700:
                chats[chat] = [chat, draw.randrange(1000)]
            chats[chat] += [draw.randrange(1000) for _ in range(draw.randrange(10, 60))]
            serve(store, chats[chat], str(chat))
        counted = store.stats()

    trace = read_trace(tmp_path / "asked.kvr")

    asked = counted["matched_tokens"] + counted["miss_tokens"]
    assert trace.prompt_tokens == asked
    assert trace.recorded_hit_rate == counted["matched_tokens"] / asked
    assert 0.1 < trace.recorded_hit_rate < 0.9
    played = play(trace, Setup((("host", 200),)))
    hits = int(played.hit_blocks.sum()) * BLOCK
    # A prompt that ends on the border of a block may be matched whole in a replay; an engine computes its last token.
    assert hits / asked == pytest.approx(trace.recorded_hit_rate, abs=0.005)


def test_the_end_of_a_request_is_written_with_its_reason_or_that_it_was_dropped(tmp_path: Path) -> None:
    with open_recorded(tmp_path / "asked.kvr", 50) as store:
        serve(store, list(range(40)), "ada", "tool_use")
        request = store.request(list(range(40)))
        store.lookup(request)
        store.extend(request, list(range(20)))
        store.abandon(request)
        store.peek(store.request(list(range(40))))  # asks, and is no request of an engine

    first, second = read_trace(tmp_path / "asked.kvr").requests

    assert (first.finish_reason, first.hit_tokens, first.session) == ("tool_use", 0, 0)
    assert (second.kind, second.hit_tokens, second.session) == (ABANDONED, 32, -1)
    assert (second.num_prompt_tokens, second.num_answer_tokens, second.blocks) == (40, 20, first.blocks)


def test_what_was_written_and_dropped_is_counted_where_there_is_a_recording(tmp_path: Path) -> None:
    with open_recorded(tmp_path / "asked.kvr", 50) as store:
        assert store.stats()["record_dropped"] == 0
        assert "recorded" in store.stats()
    with open_recorded(None, 50) as store:
        assert "recorded" not in store.stats()
