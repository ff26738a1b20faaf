from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.demo.random_model import Shape, make_random_model
from kvstore.demo.replica import DemoReplica, ReplicaSpec, serve

CHUNK = 64
MESSAGES = [{"role": "system", "content": "a long text " * 20}, {"role": "user", "content": "why?"}]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_random_model(directory, Shape(hidden=64, layers=2, heads=4, kv_heads=2, mlp=64, positions=2048))
    return directory


@pytest.fixture
def spec(model_directory: Path, tmp_path: Path) -> ReplicaSpec:
    return ReplicaSpec(str(model_directory), "float32", 1, CHUNK, disk_path=str(tmp_path / "disk"))


@pytest.fixture
def replica(spec: ReplicaSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[DemoReplica]:
    monkeypatch.setattr("kvstore.demo.replica.HOST_BYTES", 16 << 20)
    monkeypatch.setattr("kvstore.demo.replica.DISK_BYTES", 16 << 20)
    replica = DemoReplica(spec)
    yield replica
    replica.close()


def ignore(_: dict[str, Any]) -> None:
    pass


def test_the_second_time_is_reused_and_gives_the_tokens_of_a_run_without_store(replica: DemoReplica) -> None:
    cold = replica.ask(MESSAGES, 8, False, ignore)
    first = replica.ask(MESSAGES, 8, True, ignore)
    assert replica.flush() == {"flushed": True}

    again = replica.ask(MESSAGES, 8, True, ignore)

    assert sum(first["reused"].values()) == sum(cold["reused"].values()) == 0
    assert again["reused"] == {"host": again["prompt_tokens"] // CHUNK * CHUNK}
    assert cold["tokens"] == first["tokens"] == again["tokens"]
    assert cold["ttft_s"] > 0 < cold["cpu_s"]


def test_a_run_without_store_leaves_nothing_behind(replica: DemoReplica) -> None:
    replica.ask(MESSAGES, 2, False, ignore)
    replica.flush()

    assert sum(replica.ask(MESSAGES, 2, True, ignore)["reused"].values()) == 0


def test_another_replica_on_the_same_disk_finds_the_pages(replica: DemoReplica, spec: ReplicaSpec) -> None:
    first = replica.ask(MESSAGES, 8, True, ignore)
    replica.flush()
    other = DemoReplica(spec)
    try:
        found = other.ask(MESSAGES, 8, True, ignore)
    finally:
        other.close()

    assert found["reused"] == {"disk": found["prompt_tokens"] // CHUNK * CHUNK}
    assert found["tokens"] == first["tokens"]


def test_prompts_have_the_asked_length_in_this_models_tokens(replica: DemoReplica) -> None:
    texts = replica.prompts(600)

    lengths = [len(replica.tokenizer.encode(text)) for text in (texts["handbook"], texts["forked"])]
    assert all(600 <= length < 1800 for length in lengths)


def test_commands_are_answered_line_by_line_and_a_bad_one_does_not_end_it(spec: ReplicaSpec) -> None:
    said: list[dict[str, Any]] = []
    commands = [
        {"do": "dance"},
        {"do": "ask", "messages": MESSAGES, "max_new_tokens": 2, "use_store": True},
        {"do": "flush"},
    ]

    serve(spec, [json.dumps(command) for command in commands], said.append)

    assert [record["event"] for record in said if record["event"] != "piece"] == ["done", "error", "done", "done"]
    assert "unknown command 'dance'" in said[1]["message"]
    assert said[-1]["flushed"] is True
