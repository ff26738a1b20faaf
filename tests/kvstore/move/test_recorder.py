"""The recording as it is written: lines without text, within a bound, never in the way of a request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.traces import read_trace
from kvstore.move import recorder as module
from kvstore.move.recorder import NUM_FILES, TrafficRecorder
from kvstore.plan.ended import ABANDONED, EndedRequest
from kvstore.plan.records import Request, RequestOptions
from radix.namespace import BlockHash

SIZE = 4
MANY = 1 << 24


def ended(path: list[int], *, reason: str = "stop", session: str = "", hits: int = 0, answer: int = 0) -> EndedRequest:
    """A request over blocks that are named by all before them."""
    keys = [BlockHash(sha256(bytes(path[: end + 1])).digest()) for end in range(len(path))]
    num_tokens = len(path) * SIZE + 1
    request = Request(1, keys, num_tokens + answer, RequestOptions(session=session, tenant=session))
    return EndedRequest(request, num_tokens, {"host": hits} if hits else {}, 0.5, reason)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "asked.kvr"


@pytest.fixture
def recorder(path: Path) -> Iterator[TrafficRecorder]:
    made = TrafficRecorder(path, SIZE, MANY)
    yield made
    made.close()


def test_what_was_asked_is_read_again_as_a_trace(path: Path, recorder: TrafficRecorder) -> None:
    for one in (
        ended([1, 2, 3], session="ada", answer=7),
        ended([1, 2, 3, 4], session="ada", hits=12, reason="length"),
        ended([1, 9], session="bob", hits=4, reason=ABANDONED),
        ended([]),
    ):
        recorder.put(one)
    recorder.close()

    trace = read_trace(path)

    assert trace.block_tokens == SIZE
    assert [request.blocks for request in trace.requests] == [(0, 1, 2), (0, 1, 2, 3), (0, 4), ()]
    assert [request.session for request in trace.requests] == [0, 0, 1, -1]
    assert [request.num_answer_tokens for request in trace.requests] == [7, 0, 0, 0]
    assert [request.finish_reason for request in trace.requests] == ["stop", "length", "", "stop"]
    assert trace.requests[2].kind == ABANDONED
    assert trace.recorded_hit_rate == 16 / (13 + 17 + 9 + 1)


def test_nothing_of_a_name_or_a_hash_is_in_the_file(path: Path, recorder: TrafficRecorder) -> None:
    one = ended([1, 2, 3], session="ada@example.com", reason="the user said: my secret")

    recorder.put(one)
    recorder.close()

    written = path.read_text()
    assert "ada" not in written
    assert "secret" not in written
    assert json.loads(written.splitlines()[1])["x"] == "other"
    assert all(key.hex()[:16] not in written for key in one.request.keys)
    assert path.stat().st_mode & 0o077 == 0
    assert (path.parent / "asked.kvr.key").stat().st_mode & 0o077 == 0


def test_names_are_the_same_after_a_restart_and_others_with_another_key(tmp_path: Path, path: Path) -> None:
    for _ in range(2):
        made = TrafficRecorder(path, SIZE, MANY)
        made.put(ended([1, 2]))
        made.close()
    other = TrafficRecorder(tmp_path / "other.kvr", SIZE, MANY)
    other.put(ended([1, 2]))
    other.close()

    names = [json.loads(line)["h"] for line in path.read_text().splitlines() if '"h"' in line]
    others = [json.loads(line)["h"] for line in (tmp_path / "other.kvr").read_text().splitlines() if '"h"' in line]
    assert names[0] == names[1] != others[0]
    assert read_trace(path).num_distinct == 2


def test_a_recording_is_within_its_bound_and_its_parts_are_one_trace(path: Path) -> None:
    bound = 1 << 16
    made = TrafficRecorder(path, SIZE, bound)
    for number in range(2000):
        made.put(ended([number % 250, number // 250, 3, 4, 5, 6, 7, 8]))
    made.close()

    parts = [part for part in path.parent.iterdir() if not part.name.endswith(".key")]
    assert len(parts) == NUM_FILES
    assert sum(part.stat().st_size for part in parts) < bound + 2000
    trace = read_trace(path)
    assert 200 < len(trace.requests) < 2000
    assert all(len(request.blocks) == 8 for request in trace.requests)


def test_two_stores_write_to_one_file_and_each_is_read(path: Path) -> None:
    both = [TrafficRecorder(path, SIZE, 1 << 18), TrafficRecorder(path, SIZE, 1 << 18)]

    for number in range(500):
        for first, own in enumerate(both):
            own.put(ended([first, number % 250, number // 250]))
    for own in both:
        own.close()

    assert len(read_trace(path).requests) == 1000


def test_requests_are_in_the_order_in_which_they_were_asked_however_late_they_are_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 3600)
    now = 100.0
    monkeypatch.setattr(module.time, "time", lambda: now)
    made = TrafficRecorder(path, SIZE, MANY)

    for first, took_s in ((1, 0.25), (2, 1.5), (3, 0.5)):
        made.put(replace(ended([first]), took_s=took_s))
        now += 1.0
    now += 400.0
    made.close()

    assert [request.at_s for request in read_trace(path).requests] == [99.5, 99.75, 101.5]


def test_where_the_queue_is_full_requests_are_counted_and_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED", 3)
    monkeypatch.setattr(module, "WRITE_EVERY_S", 3600)
    made = TrafficRecorder(path, SIZE, MANY)

    for _ in range(10):
        made.put(ended([1]))
    made.close()

    assert (made.num_written, made.num_dropped) == (3, 7)


def test_a_file_that_cannot_be_written_any_more_costs_its_requests_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "WRITE_EVERY_S", 3600)
    made = TrafficRecorder(path, SIZE, MANY)
    monkeypatch.setattr(module.os, "write", full)

    made.put(ended([1]))
    made.put(ended([2]))
    made.close()

    assert (made.num_written, made.num_dropped) == (0, 2)
    assert "No space left on device; requests are not recorded" in caplog.text


def test_a_place_where_no_file_can_be_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.record: .*missing.* cannot be written: No such file"):
        TrafficRecorder(tmp_path / "missing" / "asked.kvr", SIZE, MANY)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from tests.kvstore.move.test_recorder import SIZE, MANY, ended
from kvstore.move.recorder import TrafficRecorder
made = TrafficRecorder(Path(sys.argv[1]), SIZE, MANY)
for number in range(100):
    made.put(ended([number, 2]))
while made.num_written < 100:
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_no_line_that_was_written_and_a_cut_one_is_told(path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), root], cwd=root, check=False, timeout=120)
    assert killed.returncode == -9
    assert len(read_trace(path).requests) == 100
    os.truncate(path, path.stat().st_size - 10)

    trace = read_trace(path)
    assert len(trace.requests) == 99
    assert trace.notes == ("line 101 is cut off in the middle, as by a crash, and left out",)

    again = TrafficRecorder(path, SIZE, MANY)
    again.put(ended([200, 1]))
    again.close()
    assert len(read_trace(path).requests) == 100
