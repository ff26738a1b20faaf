"""An engine's own server as a child process: started, waited for, watched, ended. Used by fronts.

The hard thing: a front may be killed. So a program is started by `guard`, which ends it then; and its standard input is
a pipe of ours, whose end a program of ours may wait for. One that is told to end in the middle of its start may hang
(vLLM does, once its engine process has gone): it is killed then, with all that it has started.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import psutil

from kvstore.errors import KVStoreError

START_TIMEOUT_S = 600.0  # loading a large model from a cold disk
STOP_TIMEOUT_S = 20.0
STEP_S = 0.05
TAIL_BYTES = 1500
CAUSE_CHARACTERS = 400
MAX_LOG_BYTES = 16 << 20  # in memory, as a rule
# The last line of a traceback. Of many, the first says why; those after it say that somebody else has failed.
_CAUSE = re.compile(r"^(?:.*?[\])]\s)?((?:\w+\.)*\w*(?:Error|Exception|Refused|Mismatch)\b: .+)$", re.MULTILINE)
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach 127.0.0.1
_Same = TypeVar("_Same", bound="ServerProcess")


class ServerProcess:
    """One server at `url`, with its output in the file `log`. Use as a context manager; not thread-safe.

    name:        how messages call it.
    environment: of the child; ours if None.
    next_step:   what to do where it does not come up, for the end of messages.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        next_step: str = "",
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.url = url
        self.log = log
        self._environment = environment
        self._next_step = f"\n{next_step}" if next_step else ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it, and wait until GET /health answers 200. Raises KVStoreError with the end of its log."""
        with self.log.open("ab") as output:  # appending, so that it may be cut
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=self._environment
            )
        until = time.monotonic() + timeout_s
        with _ended_by_signal():
            while not self._is_up():
                if why := self.ended():
                    raise KVStoreError(f"{why}{self._next_step}")
                if time.monotonic() > until:
                    why = f"{self.name} is not ready after {timeout_s:.0f} s; {self._last_words()}"
                    raise KVStoreError(f"{why}{self._next_step}")
                time.sleep(STEP_S)

    def ended(self) -> str:
        """Why there is no server any more, with the end of its log; "" while there is one. Asked now and then."""
        if self._process is None or self._process.poll() is None:
            if self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES:
                os.truncate(self.log, 0)
            return ""
        return f"{self.name} has ended with {self._process.returncode}; {self._last_words()}"

    def stop(self) -> None:
        """End it, by force if it does not end in time. Idempotent."""
        if self._process is not None:
            started = _descendants(self._process.pid)
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            for one in started:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None

    def __enter__(self: _Same) -> _Same:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_up(self) -> bool:
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=1.0) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _last_words(self) -> str:
        """The first cause in its log, if it is not in the end of it, and the end."""
        try:
            text = self.log.read_text(errors="replace").strip()
        except OSError:
            return "its log cannot be read"
        tail = text[-TAIL_BYTES:]
        found = _CAUSE.search(text)
        cause = f"it says: {found[1][:CAUSE_CHARACTERS]}; " if found and found[1] not in tail else ""
        return f"{cause}its log ends: {tail or 'it is empty'}"


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Have SIGTERM raise SystemExit, so that what was started is ended. In the main thread; elsewhere nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # another thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def as_child(command: Sequence[str]) -> list[str]:
    """The command of a program that is to end with this process."""
    return [sys.executable, "-m", "kvstore.cluster.guard", *command]
