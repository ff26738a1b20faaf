"""`kvstore redis check`: what it prints, and what its exit code says."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.redis_server import NEEDS_REDIS

pytestmark = pytest.mark.usefixtures("nothing_configured")


@pytest.mark.parametrize("needs", [pytest.param("redis-server", marks=NEEDS_REDIS)])
def test_a_server_is_judged_line_by_line_and_the_exit_code_tells_of_bad_ones(needs: str) -> None:
    with LocalRedis() as server:
        good = CliRunner().invoke(app, ["redis", "check", server.url, "--json"])
        with server.client() as client:
            client.config_set("maxmemory", 0)
        bad = CliRunner().invoke(app, ["redis", "check", server.url])

    lines = json.loads(good.output)
    assert good.exit_code == 0
    assert {"where", "what", "state", "found", "why", "do"} == set(lines[0])
    assert {"version", "maxmemory", "maxmemory-policy", "a page"} <= {line["what"] for line in lines}
    assert bad.exit_code == 1
    assert "CONFIG SET maxmemory" in bad.output


@pytest.mark.parametrize("needs", [pytest.param("redis-server", marks=NEEDS_REDIS)])
def test_a_server_that_takes_no_pages_is_bad_with_its_own_words(needs: str) -> None:
    with LocalRedis(policy="noeviction") as server:
        with server.client() as client:
            client.config_set("maxmemory", 1)
        full = CliRunner().invoke(app, ["redis", "check", server.url, "--json", "--page-bytes", "64KiB"])

    [page] = [line for line in json.loads(full.output) if line["what"] == "a page"]
    assert full.exit_code == 1
    assert page["state"] == "bad"
    assert "OOM" in page["why"] or "memory" in page["why"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["redis://127.0.0.1:1"], "127.0.0.1:1"),
        (["http://cache"], "redis"),
        (["redis://127.0.0.1:1", "--page-bytes", "many"], "--page-bytes: a size is"),
        (["redis://127.0.0.1:1", "--page-bytes", "0"], "a page has from 1 byte"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["redis", "check", *arguments])

    assert result.exit_code == 2
    assert told in result.output
    assert "Traceback" not in result.output
