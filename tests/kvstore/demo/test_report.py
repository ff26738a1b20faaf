from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvstore.demo.report import DemoReport, Stage, Turn, make_table, sentences, to_json, write_json
from tests.helpers.demo import answer, report, turn


def table_text(shown: DemoReport) -> str:
    out = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  # closed with the process
    out.print(make_table(shown))
    return out.export_text()


def test_json_has_the_documented_structure(tmp_path: Path) -> None:
    write_json(report(), tmp_path / "new" / "out.json")

    record = json.loads((tmp_path / "new" / "out.json").read_text())
    assert list(record) == ["model", "dtype", "threads", "stages", "identical"]
    assert record["model"] == "tiny"
    assert record["identical"] is True
    assert [stage["name"] for stage in record["stages"]] == ["cold", "host", "disk", "redis", "conversation", "fork"]
    assert record["stages"][2] == {
        "name": "disk",
        "prompt_tokens": 1000,
        "reused": {"host": 0, "disk": 960, "redis": 0},
        "ttft_s": 0.25,
        "cpu_s": 0.5,
        "identical": True,
    }


def test_json_carries_an_explanation_only_where_one_was_asked_for(tmp_path: Path) -> None:
    write_json(report(), tmp_path / "out.json", {"token_bytes": 5})

    assert json.loads((tmp_path / "out.json").read_text())["explain"] == {"token_bytes": 5}


def test_a_conversation_is_its_last_turn_but_identical_only_as_a_whole() -> None:
    wrong = replace(turn(0.5), reference=answer(4.0, tokens=(1, 2, 9)))
    shown = replace(report(), stages=(Stage("conversation", (wrong, turn(0.25))),))

    (stage,) = to_json(shown)["stages"]

    assert stage["ttft_s"] == 0.25
    assert stage["identical"] is False
    assert to_json(shown)["identical"] is False


@pytest.mark.parametrize(
    "other",
    [
        answer(4.0, tokens=(1, 2)),
        answer(4.0, tokens=(1, 2, 4)),
        replace(answer(4.0), prompt_tokens=999),
    ],
)
def test_fewer_or_other_tokens_or_another_prompt_are_not_identical(other: object) -> None:
    assert not Turn(answer(0.5), other, 4.0).identical  # type: ignore[arg-type]


def test_an_answer_of_no_tokens_shows_nothing_and_is_not_identical() -> None:
    empty = answer(0.5, tokens=())

    assert not Turn(empty, empty, 4.0).identical


def test_the_table_fits_a_terminal_and_names_every_stage() -> None:
    text = table_text(report())

    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "disk, new process" in text
    assert "conversation, turn 3" in text
    assert "16.0x" in text
    assert text.count("yes") == 7


def test_the_table_says_no_where_tokens_differ() -> None:
    wrong = replace(turn(0.5), reference=answer(4.0, tokens=(7,)))

    assert "NO" in table_text(replace(report(), stages=(Stage("host", (wrong,)),)))


def test_the_sentences_tell_the_times_and_that_nothing_changed() -> None:
    speed, identity = sentences(report())

    assert "1,000 prompt tokens" in speed
    assert "0.25 s from disk in a new process (16.0x)" in speed
    assert identity.startswith("All 7 answers had exactly the tokens")


def test_the_sentences_tell_what_went_wrong() -> None:
    wrong = Stage("host", (replace(turn(0.5), reference=answer(4.0, tokens=(7,))),))
    cold = Stage("cold", (turn(4.0),))

    _, identity = sentences(replace(report(), stages=(cold, wrong)))

    assert identity.startswith("NOT the same: host gave other tokens")


def test_a_stage_that_reused_nothing_is_told() -> None:
    cold = Stage("cold", (turn(4.0),))
    missed = Stage("redis", (Turn(answer(3.9), answer(4.0), 4.0),))

    speed, _ = sentences(replace(report(), stages=(cold, missed)))

    assert "though nothing was reused there" in speed
