"""Large bodies are read as small ones are, only elsewhere and in pieces."""

import asyncio
import json
import random
import time

import numpy as np
import pytest

from kvstore.service.http import parsing
from kvstore.service.http.models import MAX_TOKENS, Lookup
from kvstore.service.http.problems import Problem

MANY = 200_000


def body(tokens: str, **others: object) -> bytes:
    text = json.dumps({**others, "tokens": [0]})
    return text.replace("[0]", f"[{tokens}]").encode()


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" ,\n  ", ": ")])
@pytest.mark.parametrize("ids", [[0, 1, 4294967295], [17] * 3, [5, 0, 0, 7, 50_000, 12]])
def test_the_tokens_of_a_large_body_are_those_that_were_sent(ids: list[int], separators: tuple[str, str]) -> None:
    tokens = random.Random(1).choices(ids, k=MANY)

    found = parsing.read(Lookup, json.dumps({"tokens": tokens, "timeout_s": 2}, separators=separators).encode())

    assert isinstance(found.tokens, np.ndarray)
    assert found.tokens.tolist() == tokens
    assert found.timeout_s == 2.0


@pytest.mark.parametrize(
    ("text", "status", "field"),
    [
        ("1," * MANY, 400, "body"),
        ("," + "1," * MANY + "1", 400, "body"),
        ("1," * MANY + ",1", 400, "body"),
        ("1," * MANY + "05", 400, "body"),
        ("05," + "1," * MANY + "1", 400, "body"),
        ("1," * MANY + "1 1", 400, "body"),
        ("1 1," * MANY + "1", 400, "body"),
        ("1," * MANY + "-1", 400, f"tokens.{MANY}"),
        ("1," * MANY + "4294967296", 400, f"tokens.{MANY}"),
        ("1," * MANY + "9" * 400 + ",1" * 9, 400, f"tokens.{MANY}"),
        ("1," * MANY + "1.5", 400, f"tokens.{MANY}"),
        ("1," * MANY + "true", 400, f"tokens.{MANY}"),
        ("1," * MANY + "[1]", 400, f"tokens.{MANY}"),
        ("1," * MANY + '"a"', 400, f"tokens.{MANY}"),
        ("1," * MAX_TOKENS + "1", 400, "tokens"),
        ("1," * (2 * MAX_TOKENS + 1) + "1.5", 413, "body"),
        ("[" * MANY, 400, "body"),
        (" " * MANY, 400, "tokens"),
    ],
)
def test_what_is_wrong_with_a_large_body_is_told_as_with_a_small_one(text: str, status: int, field: str) -> None:
    with pytest.raises(Problem) as told:
        parsing.read(Lookup, body(text))

    assert (told.value.status, told.value.field) == (status, field)


def test_a_field_given_twice_counts_as_everywhere_the_last_time() -> None:
    text = body("1," * MANY + "1").replace(b"}", b', "tokens": [3]}')

    assert list(parsing.read(Lookup, text).tokens or []) == [3]


def test_a_number_with_a_point_is_as_good() -> None:
    assert list(parsing.read(Lookup, body("1," * MANY + "2.0")).tokens or [])[-1] == 2


async def test_others_have_their_turn_while_a_million_tokens_are_read() -> None:
    raw = json.dumps({"tokens": [4294967295] * 1_000_000}).encode()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(others())
    began = time.process_time()
    found = await parsing.Parser().read(Lookup, raw)
    took = time.process_time() - began
    busy.cancel()

    assert found.tokens is not None
    assert len(found.tokens) == 1_000_000
    assert turns > 5, f"{turns} turns in {took:.2f} s"  # 1 where the loop reads it itself
