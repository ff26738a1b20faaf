"""Logs of KV events: what is written of messages as they are on the wire, and the requests that are guessed from it."""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import msgpack

from kvstore.errors import ConfigError
from kvstore.lab.traces import read_trace
from kvstore.lab.traces.event_log import stripped
from kvstore.lab.traces.event_recorder import listen, record

SECRETS = ("a salt", 4711)


def stored(hashes: list[int], parent: int | None = None, **more: Any) -> dict[str, Any]:
    """An event as vLLM 0.32 sends it: a map, with the token ids and the salt in clear."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": [SECRETS[1]] * 16 * len(hashes),
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [[SECRETS[0]]],
    } | more


def message(seq: int, at: float, *events: Any, topic: str = "kv") -> list[bytes]:
    return [topic.encode(), seq.to_bytes(8, "big"), msgpack.encode([at, list(events), None])]


def test_a_chain_with_what_it_hangs_on_is_a_request(tmp_path: Path) -> None:
    path, big = tmp_path / "log.kve", (1 << 64) - 1
    counted = record(
        [
            message(0, 10.0, stored([1, 2])),
            message(1, 11.0, stored([3], 2)),  # an answer that grows
            message(2, 60.0, stored([4, big], 3)),  # the next turn
            message(3, 61.0, stored([7], 1), {"type": "BlockRemoved", "block_hashes": [4], "medium": "GPU"}),
            message(4, 62.0, {"type": "AllBlocksCleared"}, stored([2], 1, medium="CPU")),
        ],
        path,
        "tcp://x",
    )

    trace = read_trace(path)

    assert (counted.num_messages, counted.num_missed, counted.num_bad) == (5, 0, 0)
    assert trace.block_tokens == 16
    assert [(r.at_s, r.blocks) for r in trace.requests] == [(10.0, (0, 1, 2)), (60.0, (0, 1, 2, 3, 4)), (61.0, (0, 5))]
    assert trace.notes == ("an event log shows what was stored, not what was hit: whole hits are not in it",)


def test_events_that_are_arrays_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "log.kve"
    record([message(0, 1.0, ["BlockStored", [-5, 6], None, [SECRETS[1]] * 32, 16, None, "GPU", SECRETS[0]])], path, "x")

    assert [request.blocks for request in read_trace(path).requests] == [(0, 1)]
    assert SECRETS[0].encode() not in b64decode(json.loads(path.read_text().splitlines()[1])["b"])


def test_nothing_that_names_a_prompt_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.kve"
    record([message(0, 1.0, stored([1]))], path, "x")

    payload = b64decode(json.loads(path.read_text().splitlines()[1])["b"])
    assert SECRETS[0].encode() not in payload
    assert "token_ids" not in msgpack.decode(payload)[1][0]
    assert path.stat().st_mode & 0o077 == 0


def test_gaps_orphans_and_other_messages_are_told(tmp_path: Path) -> None:
    path = tmp_path / "log.kve"
    counted = record(
        [message(5, 1.0, stored([1])), [b"kv", b"x" * 8, b"no"], [b"kv"], message(9, 9.0, stored([3], 2))], path, "x"
    )
    record([message(0, 20.0, stored([8]))], path, "x")  # the engine was started again, and so was this

    trace = read_trace(path)

    assert (counted.num_messages, counted.num_missed, counted.num_bad) == (2, 3, 2)
    assert trace.notes[:3] == (
        "3 messages are missing in the numbers of the log",
        "1 times the numbers begin anew: a publisher was started again",
        "1 chains hang on blocks that were stored before the log began",
    )


def test_a_log_that_is_cut_off_in_the_middle_of_a_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.kve"
    record([message(at, float(at), stored([at])) for at in range(3)], path, "x")
    path.write_bytes(path.read_bytes()[:-9])

    trace = read_trace(path)

    assert len(trace.requests) == 2
    assert "line 4 is cut off in the middle, as by a crash, and left out" in trace.notes


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers(-5, 20) | st.floats() | st.binary(max_size=4) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(st.sampled_from(["type", "block_hashes", "parent_block_hash", "block_size"]), inner)
        ),
    )
)
def test_whatever_comes_over_the_wire_is_counted_or_told(tmp_path_factory: pytest.TempPathFactory, batch: Any) -> None:
    path = tmp_path_factory.mktemp("log") / "log.kve"
    counted = record([[b"", bytes(8), msgpack.encode(batch)], [b"", bytes(8), msgpack.encode([0, [batch]])]], path, "x")

    told = "log.kve"
    try:
        read_trace(path)
    except ConfigError as error:
        told = str(error)

    assert "log.kve" in told
    assert counted.num_messages + counted.num_bad == 2


def test_a_batch_keeps_its_time_and_its_rank() -> None:
    assert msgpack.decode(stripped(msgpack.encode([1.5, [], 3]))) == [1.5, [], 3]


@pytest.mark.parametrize("who_binds", ["publisher", "listener"])
def test_listening_to_a_publisher(tmp_path: Path, who_binds: str) -> None:
    zmq = pytest.importorskip("zmq")
    taken: list[Any] = []
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        if who_binds == "listener":
            publisher.unbind(endpoint)
            publisher.connect(endpoint)
            endpoint = f"tcp://*:{port}"

        def take() -> Iterator[Any]:
            for frames in listen(endpoint, "", lambda: False):
                taken.append(frames)
                yield frames
                if len(taken) == 3:
                    return

        thread = threading.Thread(target=record, args=(take(), tmp_path / "log.kve", "x"))
        thread.start()
        publisher.recv()  # it has subscribed
        for seq in range(3):
            publisher.send_multipart(message(seq, float(seq), stored([seq])))
        thread.join(60)

    assert len(read_trace(tmp_path / "log.kve").requests) == 3
