from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cli.inspect import depth_buckets
from kvstore.learned import files_in
from tests.helpers.page_directory import PAGE_BYTES, SLOT_BYTES, make_directory, open_directory, store_prompt
from tests.helpers.stores import BLOCK, open_small, prompt, save

runner = CliRunner()


def inspect_json(path: Path, *options: str) -> dict[str, Any]:
    result = runner.invoke(app, ["inspect", str(path), "--json", *options])
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_inspect_tells_geometry_pages_depths_and_prefixes(tmp_path: Path) -> None:
    make_directory(tmp_path, "the cat sat on a mat", "the cat sat here", "other")

    facts = inspect_json(tmp_path)

    assert (facts["slots"], facts["slot_bytes"], facts["pages"], facts["free"]) == (64, SLOT_BYTES, 8, 56)
    assert facts["stored_bytes"] == 8 * PAGE_BYTES
    assert facts["pages_by_depth"] == {"0": 2, "1": 1, "2": 1, "3": 2, "4": 1, "5": 1}
    first, second = facts["prefixes"]
    assert (first["shared_blocks"], first["branches"], first["longest"], first["pages"]) == (3, 2, 6, 7)
    assert (second["shared_blocks"], second["branches"], second["pages"]) == (1, 0, 1)


def test_inspect_prints_the_same_for_people(tmp_path: Path) -> None:
    make_directory(tmp_path, "the cat sat on a mat", "the cat sat here", "other")

    result = runner.invoke(app, ["inspect", str(tmp_path)])

    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "64 slots of 8 KiB, 512 KiB" in words
    assert "8 with 62.5 KiB, 12 % full" in words
    assert "56 free, 0 being written, 0 with expired pages" in words
    assert "biggest prefixes (2 of 2)" in words


def test_inspect_shows_as_many_prefixes_as_asked_for(tmp_path: Path) -> None:
    make_directory(tmp_path, "a b c", "d e", "f")

    facts = inspect_json(tmp_path, "--top", "1")

    assert len(facts["prefixes"]) == 1
    assert facts["num_prefixes"] == 3


def test_inspect_of_an_empty_directory_says_so_without_tables(tmp_path: Path) -> None:
    make_directory(tmp_path)

    result = runner.invoke(app, ["inspect", str(tmp_path)])

    assert result.exit_code == 0
    assert "0 with 0 B, 0 % full" in " ".join(result.stdout.split())
    assert "biggest prefixes" not in result.stdout


def test_inspect_works_while_the_directory_is_in_use(tmp_path: Path) -> None:
    tier = open_directory(tmp_path)
    try:
        store_prompt(tier, "a", "b")

        assert inspect_json(tmp_path)["pages"] == 2

        store_prompt(tier, "c")
        assert inspect_json(tmp_path)["pages"] == 3
    finally:
        tier.close()


def test_path_with_brackets_is_printed_as_it_is(tmp_path: Path) -> None:
    make_directory(tmp_path / "[bold]x", "a")

    result = runner.invoke(app, ["inspect", str(tmp_path / "[bold]x")])

    assert "[bold]x" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_page_directory_is_told(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    told = {
        "nowhere": "does not exist; give the directory of a disk tier",
        "file": "is not a directory; give the directory of a disk tier",
        "empty": "is not the directory of a disk tier: there is no index/ in it",
    }

    for name, words in told.items():
        result = runner.invoke(app, [command, str(tmp_path / name)])

        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert f"{tmp_path / name} {words}" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_of_a_daemons_disk_path_the_directories_below_it_are_named(tmp_path: Path, command: str) -> None:
    make_directory(tmp_path / "local" / "one", "a")
    make_directory(tmp_path / "local" / "two", "a")

    result = runner.invoke(app, [command, str(tmp_path)])

    assert result.exit_code == 2
    assert "here are 2:" in result.stderr
    for name in ("one", "two"):
        assert f"  {tmp_path / 'local' / name}\n" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_directory_of_somebody_else_is_told(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory(tmp_path, "a")
    monkeypatch.setattr(os, "access", lambda *_: False)  # what the kernel says to a user who is not root

    result = runner.invoke(app, [command, str(tmp_path)])

    assert result.exit_code == 2
    assert "permission denied; run this as the user that owns it" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_index_that_is_garbage_is_one_line_and_stays_as_it_was(tmp_path: Path, command: str) -> None:
    make_directory(tmp_path, "a b c")
    index = tmp_path / "index" / "data.mdb"
    index.write_bytes(b"\x55" * index.stat().st_size)

    result = runner.invoke(app, [command, str(tmp_path)])

    assert result.exit_code == 2
    assert result.stderr.startswith("kvstore: ")
    assert "Traceback" not in result.output
    assert index.read_bytes()[:64] == b"\x55" * 64


def test_depths_fall_into_buckets_that_double() -> None:
    assert depth_buckets({0: 5, 1: 4, 2: 3, 3: 2, 4: 1, 9: 7}) == [
        (0, 0, 5),
        (1, 1, 4),
        (2, 3, 5),
        (4, 7, 1),
        (8, 15, 7),
    ]


def learned_directory(path: Path) -> Path:
    """A directory whose store's host policy has learned from some requests; its file of tables."""
    with open_small(path, host={"policy": "outlook"}) as store:
        for seed in range(9):
            request = store.request(prompt(3, seed))
            save(store, request)
            store.keep.finished(request, finish_reason="stop")
    (tables,) = files_in(path)
    return tables


def test_inspect_shows_what_policies_have_learned(tmp_path: Path) -> None:
    tables = learned_directory(tmp_path)

    facts = inspect_json(tmp_path)
    words = " ".join(runner.invoke(app, ["inspect", str(tmp_path)]).stdout.split())

    (told,) = facts["policies"]
    assert (told["path"], told["tier"], told["policy"], told["block_size"]) == (str(tables), "host", "outlook", BLOCK)
    assert told["classes"][0]["words"] == []
    assert told["classes"][0]["seen"] == 27
    assert "what outlook of tier host believes" in words
    assert "used once ░" in words or "used once █" in words or "used once ▓" in words
    assert "after end_turn" in words
    assert facts["written_day_bytes"] == facts["stored_bytes"] > 0


@pytest.mark.parametrize("is_broken", [True, False])
def test_inspect_of_tables_that_cannot_be_read_says_why_and_shows_the_rest(tmp_path: Path, is_broken: bool) -> None:
    tables = learned_directory(tmp_path)
    raw = tables.read_bytes()
    tables.write_bytes(raw[:-3] if is_broken else tables_of("nobody", raw))

    result = runner.invoke(app, ["inspect", str(tmp_path)])

    assert result.exit_code == 0
    assert ("does not fit its checksum" if is_broken else "must be one of") in " ".join(result.stdout.split())
    assert "pages by depth" in result.stdout
    assert "cannot be read" in inspect_json(tmp_path)["policies"][0]["problem"]


def tables_of(policy: str, raw: bytes) -> bytes:
    """A file of tables that another policy wrote."""
    body = raw.partition(b"\n")[2].replace(b'"outlook"', f'"{policy}"'.encode(), 1)
    return b"kvstore-policy-tables 1 " + sha256(body).hexdigest().encode() + b"\n" + body
