"""`kvstore replica` and `kvstore router`: what they make of their options, and what they say of wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cluster.replica import ReplicaSettings
from kvstore.cluster.router import RouterSettings

runner = CliRunner()


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory that looks like a model's; nothing here loads it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    return str(tmp_path / "m")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been served."""
    seen: list[Any] = []
    monkeypatch.setattr("kvstore.cluster.replica.serve", lambda settings, config, announce: seen.append(settings))
    monkeypatch.setattr("kvstore.cluster.router.serve", lambda settings, announce: seen.append(settings))
    return seen


def test_a_replica_is_what_its_options_say(served: list[Any], model: str) -> None:
    options = ["--name", "r", "--port", "0", "--dtype", "bfloat16", "--threads", "2", "--max-tokens-queued", "99"]
    result = runner.invoke(app, ["replica", "--model", model, *options, "--set", "store.block_size=32"])

    assert result.exit_code == 0, result.output
    (settings,) = served
    assert isinstance(settings, ReplicaSettings)
    assert (settings.name, settings.port, settings.max_tokens) == ("r", 0, 99)
    assert (settings.model.name, settings.model.dtype, settings.model.threads) == ("m", "bfloat16", 2)


@pytest.mark.parametrize(("set_", "expected"), [([], True), (["false"], False), (["true"], True)])
def test_single_flight_is_on_unless_somebody_says_otherwise(
    served: list[Any], model: str, set_: list[str], expected: bool
) -> None:
    options = [part for value in set_ for part in ("--set", f"store.single_flight={value}")]

    assert runner.invoke(app, ["replica", "--model", model, *options]).exit_code == 0

    assert served[0].model.single_flight is expected


def test_a_router_is_what_its_options_say(served: list[Any]) -> None:
    result = runner.invoke(app, ["router", "-r", "http://a:1", "-r", "http://b:2", "--policy", "prefix", "-p", "0"])

    assert result.exit_code == 0, result.output
    assert served == [RouterSettings(["http://a:1", "http://b:2"], "prefix", "127.0.0.1", 0)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["replica", "--model", "/nowhere/at/all"], "is neither a directory"),
        (["replica", "--model", "random", "--set", "store.blocksize=3"], "store.blocksize"),
        (["replica", "--dtype", "int4"], "bfloat16"),
        (["router"], "--replica is missing"),
        (["router", "-r", "http://a:1", "--policy", "best"], "it must be one of round-robin, prefix"),
        (["router", "-r", "a:1"], "it must be http://host:port"),
    ],
)
def test_what_is_wrong_is_told_with_what_would_be_right(arguments: list[str], told: str) -> None:
    result = runner.invoke(app, arguments)

    assert result.exit_code == 2
    assert told in result.output


def test_a_model_that_cannot_be_loaded_is_one_line(model: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["replica", "--model", model, "--port", "0"])

    assert result.exit_code == 2
    assert f"the model {model} cannot be loaded" in result.output
