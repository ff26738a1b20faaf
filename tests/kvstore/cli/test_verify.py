from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli import verify as command
from kvstore.cli.app import app
from tests.helpers.page_directory import PAGE_BYTES, SLOT_BYTES, flip_bit, make_directory, open_directory, store_prompt

runner = CliRunner()


def test_whole_directory_is_good_and_exit_code_is_0(tmp_path: Path) -> None:
    make_directory(tmp_path, "the cat sat on a mat", "the cat sat here")

    result = runner.invoke(app, ["verify", str(tmp_path), "--json"])

    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (report["pages"], report["good"], report["bad"], report["bad_pages"]) == (7, 7, 0, [])
    assert report["good_bytes"] == 7 * PAGE_BYTES


@pytest.mark.parametrize("byte", [0, PAGE_BYTES // 2, PAGE_BYTES - 1])
def test_one_flipped_bit_is_found_and_exit_code_is_1(tmp_path: Path, byte: int) -> None:
    make_directory(tmp_path, "a b c d")
    flip_bit(tmp_path, 2 * SLOT_BYTES + byte)

    result = runner.invoke(app, ["verify", str(tmp_path), "--json"])

    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (report["good"], report["bad"]) == (3, 1)
    assert report["bad_pages"][0]["depth"] == 2
    assert "checksum" in report["bad_pages"][0]["reason"]


def test_slab_that_was_cut_off_is_found(tmp_path: Path) -> None:
    make_directory(tmp_path, "a b c d")
    with (tmp_path / "pages.slab").open("r+b") as slab:
        slab.truncate(2 * SLOT_BYTES)

    result = runner.invoke(app, ["verify", str(tmp_path), "--json"])

    assert result.exit_code == 1
    assert json.loads(result.stdout)["bad"] == 2


def test_people_get_a_table_of_bad_pages_and_what_to_do(tmp_path: Path) -> None:
    make_directory(tmp_path, "a b c d")
    flip_bit(tmp_path, SLOT_BYTES)

    result = runner.invoke(app, ["verify", str(tmp_path), "--quiet"])

    assert result.exit_code == 1
    assert "bad pages" in result.stdout
    assert "slot 1" in result.stdout
    assert "Nothing has to be repaired" in result.stdout
    assert result.stderr == ""


def test_long_list_of_bad_pages_is_cut_in_print_and_whole_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MOST_BAD_SHOWN", 2)
    make_directory(tmp_path, "a b c d")
    for slot in range(4):
        flip_bit(tmp_path, slot * SLOT_BYTES)

    printed = runner.invoke(app, ["verify", str(tmp_path), "-q"])
    report = json.loads(runner.invoke(app, ["verify", str(tmp_path), "--json"]).stdout)

    assert "... and 2 more; --json lists all of them" in printed.stdout
    assert len(report["bad_pages"]) == 4


def test_progress_goes_to_standard_error_only(tmp_path: Path) -> None:
    make_directory(tmp_path, "a b c")

    result = runner.invoke(app, ["verify", str(tmp_path)], env={"FORCE_COLOR": "1"})

    assert result.exit_code == 0
    assert "every page is what was written" in result.stdout
    assert "verify: 3 of 3 pages, 0 bad" in result.stderr
    assert "3/3" not in result.stdout


def test_progress_is_left_out_where_nobody_watches(tmp_path: Path) -> None:
    make_directory(tmp_path, "a b c")

    assert runner.invoke(app, ["verify", str(tmp_path)]).stderr == ""


def test_empty_directory_has_no_bad_page(tmp_path: Path) -> None:
    make_directory(tmp_path)

    result = runner.invoke(app, ["verify", str(tmp_path)])

    assert result.exit_code == 0
    assert "no page is stored" in result.stdout


def test_verify_works_while_the_directory_is_in_use_and_changes_nothing(tmp_path: Path) -> None:
    tier = open_directory(tmp_path)
    try:
        keys = store_prompt(tier, "a", "b", "c")
        flip_bit(tmp_path, SLOT_BYTES)

        result = runner.invoke(app, ["verify", str(tmp_path), "--json"])

        assert json.loads(result.stdout)["bad"] == 1
        assert tier.contains(keys, timeout_s=5.0) == [True, True, True]
    finally:
        tier.close()
