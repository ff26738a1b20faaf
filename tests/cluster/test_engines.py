from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.cluster.engines import ENGINES, ReplicaPlace, find_engine
from kvstore.cluster.programs import find_vllm
from kvstore.errors import ConfigError, KVStoreError

REPLICA = ReplicaPlace(
    "replica-3",
    "127.0.0.1",
    8004,
    "/models/m",
    threads=2,
    server="/opt/engine",
    settings=("service.url=unix:///n.sock",),
    arguments=("--max-queue", "8", "--", "--more", "1"),
)


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No program is on the path, and no environment is kept."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_VENV", raising=False)
    (tmp_path / "bin").mkdir()
    return tmp_path


def executable(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("engine", "command"), [("transformers", "replica"), ("vllm", "vllm"), ("llamacpp", "llamacpp")]
)
def test_a_replica_of_any_engine_has_its_name_its_port_its_node_and_the_users_options_last(
    engine: str, command: str
) -> None:
    made = ENGINES[engine].command(REPLICA)

    assert made[1:4] == ("-m", "kvstore", command)
    words = " ".join(made)
    assert "--model /models/m --name replica-3 --host 127.0.0.1 --port 8004" in words
    assert "--threads 2" in words
    assert words.endswith("--set service.url=unix:///n.sock --max-queue 8 -- --more 1")
    assert ("--server /opt/engine" in words) == (engine != "transformers")


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="--engine is 'tgi'; it must be one of transformers, vllm, llamacpp"):
        find_engine("tgi")


def test_a_gguf_file_has_its_own_dtype() -> None:
    with pytest.raises(ConfigError, match="--dtype: a GGUF file has its own"):
        ENGINES["llamacpp"].command(ReplicaPlace("r", "h", 1, "m", dtype="bfloat16"))


def test_transformers_runs_no_program() -> None:
    assert ENGINES["transformers"].find_server(None) == ""
    with pytest.raises(ConfigError, match="--server x: transformers runs in our own process"):
        ENGINES["transformers"].find_server("x")


class TestFindingVllm:
    def test_none_is_told_with_two_ways_out(self, nothing_installed: Path) -> None:
        with pytest.raises(
            KVStoreError, match=r"no vllm on the path; .* \(--server VENV/bin/python\), .* make test-vllm"
        ):
            find_vllm(None)

    def test_one_that_is_named_and_not_there_is_told(self, nothing_installed: Path) -> None:
        with pytest.raises(KVStoreError, match="--server /no/such: there is no such program"):
            find_vllm("/no/such")

    def test_the_one_on_the_path_comes_before_that_of_the_tests(self, nothing_installed: Path) -> None:
        kept = nothing_installed / "kvstore" / "vllm-venv-1"
        python = executable(kept / "bin" / "python")
        (kept / ".locked-1").touch()
        assert find_vllm(None) == python

        on_path = executable(nothing_installed / "bin" / "vllm")

        assert find_vllm(None) == on_path

    def test_an_environment_that_was_not_finished_is_none(self, nothing_installed: Path) -> None:
        executable(nothing_installed / "kvstore" / "vllm-venv-1" / "bin" / "python")

        with pytest.raises(KVStoreError, match="no vllm on the path"):
            find_vllm(None)
