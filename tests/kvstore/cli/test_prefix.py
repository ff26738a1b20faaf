"""`kvstore prefix` tells, in words, in JSON and by its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from tests.kvstore.prefix import templates


def run(*arguments: str, code: int) -> str:
    result = CliRunner().invoke(app, ["prefix", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("STABLE", "TOOLS_MOVE", "REFUSES_ALL", "NO_TEMPLATE"):
        (tmp_path / f"{name}.jinja").write_text(getattr(templates, name))
    return tmp_path


def test_a_stable_template_ends_with_0_and_says_that_tokens_are_estimates(folder: Path) -> None:
    printed = run(str(folder / "STABLE.jinja"), code=0)

    assert "stable: every turn begins with the prompt before it" in printed
    assert "Tokens are estimates of a stand-in" in printed


def test_an_unstable_one_ends_with_1_names_why_and_writes_json(folder: Path) -> None:
    printed = run(str(folder / "TOOLS_MOVE.jinja"), "--json", str(folder / "out.json"), "--block-size", "16", code=1)

    assert "tool list moves" in printed
    assert json.loads((folder / "out.json").read_text())["stable"] is False


@pytest.mark.parametrize("name", ["REFUSES_ALL.jinja", "NO_TEMPLATE.jinja", "nowhere.jinja"])
def test_what_cannot_be_told_ends_with_2(folder: Path, name: str) -> None:
    run(str(folder / name), code=2)


@pytest.mark.parametrize(
    "option", [("--block-size", "0"), ("--block-size", "x"), ("--kwargs", "[1]"), ("--kwargs", "{")]
)
def test_a_wrong_option_is_told(folder: Path, option: tuple[str, str]) -> None:
    assert option[0] in run(str(folder / "STABLE.jinja"), *option, code=2)


def test_a_model_directory_counts_with_its_own_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from kvstore.demo.random_model import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(templates.STABLE)

    printed = run(str(tmp_path), "--json", str(tmp_path / "out.json"), code=0)

    assert "estimates" not in printed
    assert json.loads((tmp_path / "out.json").read_text())["tokens_are_estimates"] is False


QUESTION = {"role": "user", "content": "When does the ferry leave the island?"}
ANSWER = {"role": "assistant", "content": "It leaves at seven."}


def test_a_log_is_read_line_by_line_and_bad_lines_are_told(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    second = [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        ANSWER,
        {"role": "user", "content": "And tomorrow?"},
    ]
    log.write_text("\n".join([json.dumps({"messages": [QUESTION]}), "nonsense", json.dumps({"messages": second})]))

    printed = run("--log", str(log), code=1)

    assert "2 requests, 1 sessions, 1 turns" in printed
    assert "client changed the system message" in printed
    assert "line 2 is no request: it is not JSON" in printed


def test_lines_that_the_template_refuses_are_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(templates.REFUSES_SYSTEM)
    refused = json.dumps({"messages": [{"role": "system", "content": "Be brief."}, QUESTION]})
    (tmp_path / "log.jsonl").write_text("\n".join([json.dumps({"messages": [QUESTION]}), *[refused] * 4]))

    printed = run(str(tmp_path / "t.jinja"), "--log", str(tmp_path / "log.jsonl"), code=2)

    for number in (2, 3, 4):
        assert f"line {number} is refused by the template: TemplateError: no system message here" in printed
    assert "4 requests are refused by the template" in printed
    assert "line 5" not in printed


def test_answers_worth_saving_are_told(folder: Path) -> None:
    (folder / "loops.jinja").write_text(templates.THINKS_IN_LOOPS)

    printed = run(str(folder / "loops.jinja"), "--json", str(folder / "out.json"), code=1)

    told = "answers without reasoning and tool calls with reasoning, as far as the next prompt can begin with them"
    assert f'"save": "auto" saves of answers: {told}' in printed
    assert json.loads((folder / "out.json").read_text())["saved_answers"].startswith(told)


def test_a_tokenizer_that_is_no_directory_asks_no_hub(folder: Path) -> None:
    printed = run(str(folder / "STABLE.jinja"), "--tokenizer", "/no/such/folder", code=2)

    assert "'/no/such/folder' is neither a directory nor a hub id like 'owner/name'" in printed


def test_a_log_without_a_second_turn_leaves_it_open(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"messages": [QUESTION]}))

    run("--log", str(tmp_path / "log.jsonl"), code=2)


@pytest.mark.parametrize(("name", "code", "told"), [("STABLE", 0, "begins with"), ("TOOLS_MOVE", 1, "tool list moves")])
def test_two_requests_are_compared(folder: Path, name: str, code: int, told: str) -> None:
    tools = [{"type": "function", "function": {"name": "read_timetable", "parameters": {}}}]
    more = [QUESTION, ANSWER, {"role": "user", "content": "And how long does it take?"}]
    (folder / "TOOLS_MOVE.jinja").write_text(templates.TOOLS_MOVE)
    for file, messages in (("a.json", [QUESTION]), ("b.json", more)):
        (folder / file).write_text(json.dumps({"messages": messages, "tools": tools}))

    printed = run(
        "diff", str(folder / "a.json"), str(folder / "b.json"), "--template", str(folder / f"{name}.jinja"), code=code
    )

    assert told in printed
