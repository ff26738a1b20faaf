"""The parent's end, against small programs that speak the protocol, or do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.demo.replica import ReplicaSpec
from kvstore.demo.replica_process import ReplicaFailed, ReplicaProcess

SPEC = ReplicaSpec(source="nowhere", dtype="float32", threads=1, prefill_chunk=64)
PREAMBLE = """
import json, sys, time
def say(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)
spec = sys.stdin.readline()
"""
ANSWER = {"prompt_tokens": 9, "reused": {"disk": 4}, "ttft_s": 0.5, "cpu_s": 1, "tokens": [3, 1], "text": "yes"}

Start = Callable[[str], ReplicaProcess]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def run(program: str) -> ReplicaProcess:
        return ReplicaProcess("replica", SPEC, tmp_path, command=[sys.executable, "-c", PREAMBLE + program])

    return run


def test_an_answer_comes_back_with_its_pieces(start: Start) -> None:
    program = f"""
say("done")
for line in sys.stdin:
    asked = json.loads(line)
    for text in ("y", "es"):
        say("piece", text=text)
    say("done", **{ANSWER})
"""
    heard: list[str] = []
    with start(program) as replica:
        answer = replica.ask([{"role": "user", "content": "?"}], max_new_tokens=2, on_text=heard.append)

    assert heard == ["y", "es"]
    assert (answer.prompt_tokens, answer.reused, answer.tokens) == (9, {"disk": 4}, (3, 1))


def test_the_spec_arrives_as_the_first_line(start: Start) -> None:
    with start('say("done")\nsys.stdin.readline()\nsay("done", spec=spec)') as replica:
        assert ReplicaSpec.from_json(replica.call({"do": "?"})["spec"]) == SPEC


def test_a_child_that_dies_is_told_with_its_last_words(start: Start) -> None:
    with pytest.raises(ReplicaFailed, match=r"replica: it ended unexpectedly; its last words: .*no model here"):
        start('sys.exit("no model here")')


def test_a_child_that_ends_before_a_command_is_told(start: Start) -> None:
    with start('say("done")') as replica:
        replica._process.wait()

        with pytest.raises(ReplicaFailed, match=r"replica: it (has ended|ended unexpectedly)"):
            replica.call({"do": "flush"})


def test_a_child_that_says_nothing_is_waited_for_no_longer_than_the_deadline(start: Start) -> None:
    replica = start('say("done")\ntime.sleep(600)')

    with pytest.raises(ReplicaFailed, match="did not answer in time"):
        replica.call({"do": "flush"}, timeout_s=0.05)

    replica.kill()


def test_an_error_that_the_child_reports_keeps_it_running(start: Start) -> None:
    program = """
say("done")
sys.stdin.readline()
say("error", message="no such prompt")
sys.stdin.readline()
say("done", flushed=True)
"""
    with start(program) as replica:
        with pytest.raises(ReplicaFailed, match="replica: no such prompt"):
            replica.call({"do": "ask"})

        replica.flush()


def test_pages_that_were_not_written_behind_are_an_error(start: Start) -> None:
    with (
        start('say("done")\nsys.stdin.readline()\nsay("done", flushed=False)') as replica,
        pytest.raises(ReplicaFailed, match="not written behind"),
    ):
        replica.flush()


def test_closing_twice_is_closing_once(start: Start) -> None:
    replica = start('say("done")\nsys.stdin.read()')

    replica.close()
    replica.close()

    assert replica._process.returncode == 0


def test_an_error_inside_with_ends_the_child_at_once(start: Start) -> None:
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), start('say("done")\ntime.sleep(600)') as replica:
        raise Interrupted

    assert replica._process.returncode is not None
