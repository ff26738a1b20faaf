from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.config.reference import effective, markdown
from kvstore.config.sections import Config

runner = CliRunner()
pytestmark = pytest.mark.usefixtures("nothing_configured")


def test_config_prints_every_field_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvstore.toml").write_text('[host]\ncapacity_bytes = "2GiB"\n')
    monkeypatch.setenv("KVSTORE_DISK__PATH", "/mnt/nvme")

    result = runner.invoke(app, ["config"])

    lines = [line.split() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert ["host.capacity_bytes", "2", "GiB", "kvstore.toml"] in lines
    assert ["disk.path", "/mnt/nvme", "environment", "KVSTORE_DISK__PATH"] in lines
    assert ["store.block_size", "64", "default"] in lines
    assert {row.field for row in effective(Config())} <= {line[0] for line in lines if line}


def test_config_json_has_plain_values_and_sources() -> None:
    result = runner.invoke(app, ["config", "--json", "--set", "host.ttl_s=10min", "--set", "disk.path=/d"])

    values = json.loads(result.stdout)
    assert values["host.ttl_s"] == {"value": 600.0, "source": "--set"}
    assert values["disk.path"]["value"] == "/d"
    assert values["redis.url"] == {"value": None, "source": "default"}
    assert values["host.huge_pages"]["value"] is True


@pytest.mark.parametrize("options", [[], ["--json"], ["--explain"]])
def test_config_never_prints_a_password(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_REDIS__URL", "redis://u:s3cret@h")

    result = runner.invoke(app, ["config", *options])

    assert "redis://u:***@h" in result.stdout
    assert "s3cret" not in result.output


def test_config_explains_fields_when_asked() -> None:
    assert "the unit of reuse" not in runner.invoke(app, ["config"]).stdout
    assert "the unit of reuse" in runner.invoke(app, ["config", "--explain"]).stdout


def test_config_reads_the_file_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("[store]\nblock_size = 16\n")

    result = runner.invoke(app, ["config", "--file", "other.toml", "--json"])

    assert json.loads(result.stdout)["store.block_size"] == {"value": 16, "source": "other.toml"}


def test_config_prints_the_reference() -> None:
    assert runner.invoke(app, ["config", "--markdown"]).stdout == markdown()


def test_every_mistake_is_a_line_on_standard_error(tmp_path: Path) -> None:
    (tmp_path / "kvstore.toml").write_text("[host]\ncapacity = 1\n")

    result = runner.invoke(app, ["config", "--set", "store.blocksize=16"])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "kvstore: host.capacity (from kvstore.toml) is unknown; did you mean host.capacity_bytes?",
        "kvstore: store.blocksize (from --set) is unknown; did you mean store.block_size?",
    ]


def test_assignment_without_a_value_is_refused() -> None:
    result = runner.invoke(app, ["config", "--set", "host.ttl_s"])

    assert result.exit_code == 2
    assert "write it as FIELD=VALUE" in result.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["config", "--set", "store.blocksize=16"], "store.blocksize (from --set) is unknown"),
        (["config", "--set", "host.capacity_bytes=foo"], "host.capacity_bytes is 'foo' (from --set)"),
        (["config", "--set", "store=5"], "store is '5' (from --set)"),
        (["serve", "--set", "service.http_port=99999999"], "service.http_port is '99999999' (from --set)"),
        (["cluster", "up", "--model", "random", "--redis", "foo"], "redis.url is 'foo' (from --redis)"),
    ],
)
def test_an_error_names_the_option_that_the_value_came_by(command: list[str], said: str) -> None:
    result = runner.invoke(app, command)

    assert said in str(result.exception) + result.output
