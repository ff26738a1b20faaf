"""Logs that hold no secret and cannot be flooded.

A request may carry a secret in any place: a header that is malformed, a query, a name, a body that is no JSON. So the
servers of this package log nothing of a request but where it came from and what kind of mistake it was, and of an
exception its type and place (`where`), never its text. This module is the second lock on that door, for what libraries
and later changes log:

    MaskFormatter   masks what looks like a secret, or is one that is known here, in whole lines, tracebacks included
    Limit           lets a place in the code log so many lines in a while, and then says how many it kept back

`setup` gives both to the commands that serve. Any thread.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from urllib.parse import unquote

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
BURST = 20  # lines of one place in the code, then as many again in each PERIOD_S
PERIOD_S = 10.0
MAX_PLACES = 4096
MIN_SECRET = 8  # characters; what is shorter would mask ordinary words
MAX_CUTS = 24  # places at which one word is cut to look for a secret inside
FRAMES = 3  # innermost ones that `where` names

_known: set[bytes] = set()
_MASK = "***"
_PATTERNS = (
    # What stands before the @ of a URL, up to the last one: a password with an @ or / in it is a likely mistake.
    (re.compile(r"(\w[\w+.-]*:/{1,2})[^\s'\"<>]*@"), rf"\1{_MASK}@"),
    (re.compile(r"(?i)((?:proxy-)?authorization['\"]?\s*[:=]\s*)[^\r\n'\"]*"), rf"\1{_MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)[^\s'\",;\\]+"), rf"\1 {_MASK}"),
    (
        re.compile(
            r"(?i)([\w.-]*(?:token|password|passwd|passphrase|secret|api[_-]?key)['\"]?\s?(?:=|:\s?|%3d)\s?['\"]?)"
            r"(?!['\"]?\s)[^\s'\"&;,}\\]+"
        ),
        rf"\1{_MASK}",
    ),
)
_CUTS = re.compile(r"[^A-Za-z0-9]")


def know(secrets: Iterable[str | bytes]) -> None:
    """Mask these from now on, in every line. Digests (SHA-256) do as well: nothing is kept in the clear."""
    _known.update(one if isinstance(one, bytes) else digest(one) for one in secrets if one)


def digest(secret: str) -> bytes:
    """The digest that `know` keeps of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def mask(text: str) -> str:
    """`text` with *** for what looks like a secret or is known to be one."""
    for pattern, masked in _PATTERNS:
        text = pattern.sub(masked, text)
    if _known:
        text = re.sub(rf"\S{{{MIN_SECRET},}}", lambda found: _mask_word(found[0]), text)
    return text


def where(error: BaseException) -> str:
    """The type of an exception and the places it came through, innermost first; nothing of its text."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    cause = error.__cause__ or error.__context__
    told = f"{type(error).__name__} at {' < '.join(places)}" if places else type(error).__name__
    return told if cause is None else f"{told}, after {type(cause).__name__}"


class MaskFormatter(logging.Formatter):
    """Masks the whole line, with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class Limit(logging.Filter):
    """Lets each place in the code log `burst` lines in `period_s`; the first one after that says how many were not."""

    def __init__(
        self, burst: int = BURST, period_s: float = PERIOD_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._burst = burst
        self._period_s = period_s
        self._now = now
        self._places: dict[tuple[str, int, str], list[float]] = {}  # began, lines let through, lines kept back

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._now()
        # Debugging is asked for, and one place may log many messages: those of libraries are told apart by their text.
        place = record.pathname, record.lineno, str(record.msg)[:64]
        state = self._places.get(place)
        if state is None or now - state[0] >= self._period_s:
            held = 0.0 if state is None else state[2]
            if state is None and len(self._places) >= MAX_PLACES:
                self._places.clear()
            self._places[place] = [now, 1, 0]
            if held:
                record.msg = f"{record.getMessage()} ({held:.0f} more like this in the last {now - state[0]:.0f} s)"  # type: ignore[index]
                record.args = ()
            return True
        if state[1] < self._burst:
            state[1] += 1
            return True
        state[2] += 1
        return False


def limited(name: str) -> logging.Logger:
    """The logger of that name, with a limit of its own: for what a stranger can make happen as often as it likes."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, Limit) for one in logger.filters):
        logger.addFilter(Limit())
    return logger


def setup(*, verbose: bool) -> None:
    """Log to standard error, masked and limited; everything from INFO on if `verbose`, else from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MaskFormatter(FORMAT))
    handler.addFilter(Limit())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def _mask_word(word: str) -> str:
    """A word with every part that is a known secret masked: a part lies between two signs that are no letters."""
    for text in dict.fromkeys((word, unquote(word))):
        cuts = [-1, *(found.start() for found in _CUTS.finditer(text)), len(text)]
        if len(cuts) > MAX_CUTS:
            cuts = [*cuts[: MAX_CUTS // 2], *cuts[-MAX_CUTS // 2 :]]
        for index, first in enumerate(cuts):
            for end in reversed(cuts[index + 1 :]):
                part = text[first + 1 : end]
                if len(part) >= MIN_SECRET and digest(part) in _known:
                    return _mask_word(text.replace(part, _MASK))
    return word
