"""JSON bodies into models, also where they hold a million tokens.

Reading such a body takes a quarter of a second in one go, in which nothing else of the process runs, thread or not: it
is one call into C. So large bodies are read in a thread, and their token ids piece by piece into an array; others of
the event loop have their turn between two pieces.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from kvstore.service.http import problems
from kvstore.service.http.models import MAX_TOKENS, Prompt, parse_json
from kvstore.service.http.problems import Problem

M = TypeVar("M", bound=BaseModel)

LARGE_BYTES = 128 << 10
PIECE_BYTES = 64 << 10  # 6,000 to 30,000 ids: about a millisecond
TOKEN_LIMIT = 1 << 32
_TOKENS = re.compile(rb'"tokens"\s*:\s*\[')
_DIGITS = b"0123456789,"
_IN_TOKENS = _DIGITS + b" \t\r\n"


class Parser:
    """Reads bodies, large ones one after another. The event loop only."""

    def __init__(self) -> None:
        self._one = asyncio.Semaphore(1)  # each takes some forty bytes a token while it is read

    async def read(self, model: type[M], raw: bytes, where: str = "body") -> M:
        """The model of a body. Raises Problem 400 or 413 that names the field."""
        if len(raw) < LARGE_BYTES:
            return read(model, raw, where)
        async with self._one:
            return await asyncio.to_thread(read, model, raw, where)


def read(model: type[M], raw: bytes, where: str = "body") -> M:
    """The model of a body, at once. Any thread. Raises Problem 400 or 413."""
    tokens, rest = _split(raw) if issubclass(model, Prompt) and len(raw) >= LARGE_BYTES else (None, raw)
    if len(rest) >= LARGE_BYTES and rest.count(b",") > 2 * MAX_TOKENS:
        raise Problem(413, f"the {where} is too large", f"it holds more than {2 * MAX_TOKENS} values", where)
    try:
        found = model.model_validate(parse_json(rest))
    except ValidationError as error:
        raise problems.of_validation(error, where) from None
    except ValueError as error:
        raise Problem(400, f"the {where} is not JSON", _told(error), where) from None
    return found if tokens is None else found.model_copy(update={"tokens": _checked(tokens, where)})


def _split(raw: bytes) -> tuple[list[npt.NDArray[np.int64]] | None, bytes]:
    """The token ids of a body, and the body with [0] in their place; (None, body) where that is not so simple."""
    head = _TOKENS.search(raw)
    if head is None or raw.count(b'"tokens"') != 1:
        return None, raw
    end = raw.find(b"]", head.end())
    text = raw[head.end() : end]
    if end < 0 or len(text) < LARGE_BYTES // 2:
        return None, raw
    pieces: list[npt.NDArray[np.int64]] = []
    at = 0
    while at < len(text):
        comma = text.find(b",", at + PIECE_BYTES)
        piece = text[at : comma if comma >= 0 else len(text)]
        if piece.translate(None, _IN_TOKENS):
            return None, raw  # something else than whole numbers
        try:
            pieces.append(_numbers(piece))
        except (ValueError, OverflowError):
            return None, raw
        if comma >= 0 and not text[comma + 1 :].strip():
            return None, raw  # it ends with a comma
        at = comma + 1 if comma >= 0 else len(text)
    return pieces, raw[: head.end()] + b"0" + raw[end:]


def _numbers(piece: bytes) -> npt.NDArray[np.int64]:
    """The whole numbers of a piece, as JSON reads them. Raises ValueError or OverflowError."""
    text = piece.replace(b", ", b",")
    is_plain = not (text.translate(None, _DIGITS) or b",," in text or text[:1] in b",0" or b",0" in text)
    if is_plain and text[-1:] != b",":
        # Three times as fast as by way of a list. What is too large becomes the largest there is, and is refused then.
        return np.fromstring(text, np.int64, sep=",")
    found = np.array(parse_json(b"[" + piece + b"]"), np.int64)
    if not len(found):
        raise ValueError("there is nothing between two commas")
    return found


def _checked(pieces: list[npt.NDArray[np.int64]], where: str) -> npt.NDArray[np.uint32]:
    count = 0
    for piece in pieces:
        bad = np.flatnonzero(piece >= TOKEN_LIMIT)
        if len(bad):
            told = f"Input should be less than {TOKEN_LIMIT}"
            raise Problem(400, f"the {where} is not valid", told, f"tokens.{count + int(bad[0])}")
        count += len(piece)
    if count > MAX_TOKENS:
        told = f"List should have at most {MAX_TOKENS} items, not {count}"
        raise Problem(400, f"the {where} is not valid", told, "tokens")
    return np.concatenate([piece.astype(np.uint32) for piece in pieces])


def _told(error: Any) -> str:
    """The parser's sentence; one about bytes that are no text would repeat them."""
    return "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)[:200]
