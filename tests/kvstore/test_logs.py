"""No secret in a line, and no line without end."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import logs

SECRET = "hunter2-0123456789-abcdef"


@pytest.fixture
def known() -> None:
    logs.know([SECRET])


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        (f"GET /v1/stats?token={SECRET} HTTP/1.1", "GET /v1/stats?token=*** HTTP/1.1"),
        (f"b'Authorization: Bearer {SECRET}\\r\\n'", "b'Authorization: ***'"),
        (f"{{'Authorization': 'Basic {SECRET}'}}", "{'Authorization': ***'Basic ***'}"),
        (f"redis://kv:{SECRET}@cache:6379/0 is down", "redis://***@cache:6379/0 is down"),
        ("redis://kv:p/w@d@cache:6379/0", "redis://***@cache:6379/0"),
        ("rediss://:pw@cache:6379", "rediss://***@cache:6379"),
        (f"password={SECRET}&x=1", "password=***&x=1"),
        (f'"api_key": "{SECRET}"', '"api_key": "***"'),
        (
            "a token is needed; 5 tokens: 3 of 7, prefill_tokens=55",
            "a token is needed; 5 tokens: 3 of 7, prefill_tokens=55",
        ),
        ("tier redis is down: 127.0.0.1:6379 refused", "tier redis is down: 127.0.0.1:6379 refused"),
    ],
)
def test_what_looks_like_a_secret_is_masked(line: str, masked: str) -> None:
    assert logs.mask(line) == masked


@pytest.mark.parametrize(
    "line",
    [
        SECRET,
        f"client {SECRET} attached",
        f"'{SECRET}'",
        f"name={SECRET},x",
        f"({SECRET})@host",
        f"x/{SECRET}/y",
        "%68unter2-0123456789-abcdef",
    ],
)
def test_a_secret_that_is_known_is_masked_wherever_it_stands(known: None, line: str) -> None:
    assert "0123456789" not in logs.mask(line)


@given(line=st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_line_can_be_masked_surrogates_that_stand_alone_too(line: str) -> None:
    logs.know([SECRET])
    for text in (line, f"client {line}evil\ud800 is here", f"{line} {SECRET}"):
        assert SECRET not in logs.mask(text)


def test_a_secret_that_is_no_text_is_masked_too() -> None:
    logs.know(["not-utf8-\udcff\ud800-0123456789"])  # as the environment gives bytes that are no text

    assert logs.mask("token not-utf8-\udcff\ud800-0123456789 refused") == "token *** refused"


def test_a_traceback_is_masked_too(known: None) -> None:
    record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "it failed", (), None)
    try:
        raise ValueError(f"no {SECRET} here")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)

    line = logs.MaskFormatter(logs.FORMAT).format(record)

    assert "Traceback" in line
    assert SECRET not in line


def test_an_exception_is_told_by_type_and_place_alone() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        told = logs.where(error)

    assert told.startswith("ValueError at test_logs.py:")
    assert SECRET not in told


def test_a_place_that_logs_without_end_is_cut_short_and_says_by_how_much() -> None:
    now = [0.0]
    limit = logs.Limit(burst=3, period_s=10.0, now=lambda: now[0])
    logger = logging.Logger("limited")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.addFilter(limit)

    for now[0] in [*(step / 20 for step in range(100)), 12.0]:
        logger.warning("refused")

    assert said == ["refused"] * 3 + ["refused (97 more like this in the last 12 s)"]
