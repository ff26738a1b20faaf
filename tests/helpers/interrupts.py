"""An exception at any line of this package, as Ctrl-C or another thread may bring one."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

PACKAGES = ("/kvstore/", "/radix/", "/eviction/")
NOT_STEPS = ("/tests/", "/requests.py", "/hashing.py", "/namespace.py", "/tokens.py")  # before the lock is taken


class Interrupt(BaseException):
    """As KeyboardInterrupt: no `except Exception` catches it."""


@contextlib.contextmanager
def interrupted_at(n: int) -> Iterator[list[str]]:
    """Raise Interrupt, and swallow it, at the n-th line that is executed in here; yields where that was."""
    left = [n]
    where: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(package in name for package in PACKAGES) or any(other in name for other in NOT_STEPS):
            return None
        # A trace function can raise between the last line of a `with` and its end, or just before a `try` is entered,
        # where the interpreter looks at no signal and no exception of another thread: the lock would stay locked.
        line = linecache.getline(name, frame.f_lineno).strip()
        if event == "line" and not line.startswith("with ") and line not in ("try:", "finally:"):
            left[0] -= 1
            if left[0] == 0:
                where.append(f"{name}:{frame.f_lineno}")
                raise Interrupt(where[0])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield where
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
