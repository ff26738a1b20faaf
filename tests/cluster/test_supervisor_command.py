"""What `kvstore cluster` says before it starts anything."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cluster.supervisor_directory import RunDirectory
from tests.helpers.clusters import a_spec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that looks like a model; nobody gets as far as loading it."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def run(*arguments: str, parent: Path) -> Result:
    command, *options = arguments
    return CliRunner().invoke(app, ["cluster", command, "--directory", str(parent), *options])


def up(parent: Path, model: Path, *options: str) -> str:
    """What an `up` that must fail says; nothing of it may be left."""
    result = run("up", "--model", str(model), "--port", "0", *options, parent=parent)
    assert result.exit_code == 2, result.output
    assert RunDirectory.all(parent) == []
    return " ".join(result.stderr.split())


def test_a_missing_redis_server_is_told_with_three_ways_out(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_REDIS_SERVER", str(tmp_path / "none"))

    told = up(tmp_path, model)

    assert "is not a program" in told
    assert "apt-get install redis-server" in told
    assert told.endswith("or go without Redis: --redis none")


def test_a_port_in_use_is_told(tmp_path: Path, model: Path) -> None:
    with socket.socket() as taken:
        # The router's port follows: 470 below that of the node.
        for port in range(20470, 20970):
            try:
                taken.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
        taken.listen()

        told = up(tmp_path, model, "--port", str(port - 470), "--redis", "none")

    assert f"port {port}, for node-0, is in use by process " in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "host.capacity=1GiB"], "did you mean host.capacity_bytes?"),
        (["--set", "host.ttl_s=soon"], "host.ttl_s"),
        (["--set", "redis.url=redis://h:1/0"], "the cluster decides this itself; use --redis"),
        (["--redis", "http://h:1"], "redis.url"),
        (["--replicas", "2", "--nodes", "3"], "--nodes is 3; it must be 1 to the number of replicas, 2"),
        (["--policy", "random"], "it must be one of round-robin, prefix"),
        (["--name", "a/b"], "--name is 'a/b'"),
    ],
)
def test_a_wrong_option_is_told_before_anything_starts(
    tmp_path: Path, model: Path, options: list[str], told: str
) -> None:
    assert told in up(tmp_path, model, *options)


def test_a_model_that_is_none_is_told(tmp_path: Path) -> None:
    assert "has no config.json" in up(tmp_path, tmp_path)


def test_status_and_restart_of_a_cluster_that_is_not_up_name_those_that_are(tmp_path: Path) -> None:
    RunDirectory(tmp_path, "mine").create(a_spec("mine"))

    for command in ("status", "restart"):
        result = run(command, "--name", "other", parent=tmp_path)
        assert result.exit_code == 2
        assert "no cluster 'other' is up (up are: mine)" in " ".join(result.stderr.split())


def test_status_of_nothing_says_how_to_begin(tmp_path: Path) -> None:
    assert "kvstore cluster up" in run("status", parent=tmp_path).stdout
    assert json.loads(run("status", "--json", parent=tmp_path).stdout) == {}


def test_down_of_nothing_is_no_error(tmp_path: Path) -> None:
    result = run("down", parent=tmp_path)

    assert result.exit_code == 0
    assert "nothing was running" in result.stderr
