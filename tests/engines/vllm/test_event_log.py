"""What vLLM's own publisher sends is written down and read, without the tokens and salts that are in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.lab.traces import read_trace
from kvstore.lab.traces.event_recorder import listen, record

SALT = "a salt that nobody may see"


@pytest.mark.parametrize("is_int", ["1", "0"])
def test_vllms_publisher_is_recorded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_int: str) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", is_int)
    import zmq
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    endpoint, path = f"ipc://{tmp_path}/events", tmp_path / "log.kve"
    publisher = ZmqEventPublisher(data_parallel_rank=0, endpoint=endpoint, topic="kv")
    taken: list[Any] = []

    def take() -> Iterator[Any]:
        for frames in listen(endpoint, "", lambda: len(taken) > 1):
            taken.append(frames)
            yield frames

    def batch(at: float, *names: int, parent: int | None = None) -> Any:
        hashes = [maybe_convert_block_hash(bytes([name]) * 32) for name in names]
        above = None if parent is None else maybe_convert_block_hash(bytes([parent]) * 32)
        event = BlockStored(hashes, above, [7] * 16 * len(names), 16, None, "GPU", None, extra_keys=[(SALT,)])
        return KVEventBatch(ts=at, events=[event])

    thread = threading.Thread(target=record, args=(take(), path, endpoint))
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not taken and time.monotonic() < deadline:  # what is sent before it listens is gone
            publisher.publish(batch(1.0, 250, 2))
            time.sleep(0.1)
        publisher.publish(batch(50.0, 3, parent=2))
        thread.join(60)
    finally:
        publisher.shutdown()
        zmq.Context.instance().destroy(linger=0)  # which vLLM leaves to the end of the process

    trace = read_trace(path)
    assert trace.block_tokens == 16
    assert trace.requests[0].blocks == (0, 1)
    assert SALT.encode() in taken[0][2]  # it is on the wire
    assert SALT not in path.read_text()
