"""Texts as tokens: by the model's own tokenizer, or by a stand-in where there is none.

The stand-in cuts text into pieces of about the size that the tokens of today's models have; a marker such as `<think>`
is one. Its counts are estimates, and whoever prints them says so.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.extras import how_to_install

Ids = npt.NDArray[np.int64]

# Markers, up to six letters with the blank before them, up to three digits, runs of newlines or blanks, anything else.
_PIECES = re.compile(
    r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,24}\]| ?[^\W\d_]{1,6}|\d{1,3}|\n+| +|[^\S\n ]+|[^\w\s]|_+", re.UNICODE
)


class Tokenizer(Protocol):
    """Makes tokens of a rendered prompt. name: for reports. is_stand_in: its counts are estimates."""

    name: str
    is_stand_in: bool

    def encode(self, text: str) -> Ids:
        """Return the ids, shape (T,); markers in the text are one token where the tokenizer has them."""
        ...


class StandIn:
    """The stand-in. Ids are checksums of the pieces: equal pieces are equal tokens, in every process."""

    name = "stand-in"
    is_stand_in = True

    def encode(self, text: str) -> Ids:
        """Return the ids."""
        return np.fromiter((zlib.crc32(piece.encode()) for piece in _PIECES.findall(text)), np.int64)


class FastTokenizer:
    """A `tokenizer.json`."""

    is_stand_in = False

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Ids:
        """Return the ids."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


class HubTokenizer:
    """A tokenizer that transformers has loaded."""

    is_stand_in = False

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Ids:
        """Return the ids."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int64)


def fast_tokenizer(file: Path) -> FastTokenizer:
    """Return the tokenizer of a `tokenizer.json`. Raises ConfigError."""
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise ConfigError(f"{file}: reading it needs the package tokenizers; {how_to_install('prefix')}") from None
    try:
        return FastTokenizer(file.parent.name, Fast.from_file(str(file)))
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise ConfigError(f"{file} is no tokenizer: {str(error)[:200]}") from None
