"""Runs a program and ends with it: `python -m kvstore.cluster.guard PROGRAM ARGUMENTS`.

It stands between a front and an engine's server, because a front may be killed, and a server may hang when told to end.
The kernel tells this process when the front has ended, however it ended; the server gets a SIGTERM then, and some
seconds later everything that it has started is killed, also what has taken itself out of its process group: on Linux
orphans of the server are given to this process. Elsewhere the server's own children may survive it. A Ctrl-C is for the
front, which ends the server when it has answered what it has: the two have a process group of their own.

Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE_S = 15.0  # less than a front waits, so that it sees the server end
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def guard(command: list[str], grace_s: float = GRACE_S) -> int:
    """Run a command until it ends; return its exit status, 128 and more for a signal."""
    parent = os.getppid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        return 1  # it ended before that was said
    with suppress(PermissionError):  # the leader of a session has one already
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to tell
    server = os.fork()
    if not server:
        _become(command)

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, grace_s)

    def kill(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)

    for number in SIGNALS:
        signal.signal(number, end)
    signal.signal(signal.SIGALRM, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    status = _wait_for(server)
    _kill_what_is_left()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become(command: list[str]) -> None:
    """Run a command in this process's place."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # of a guard that was killed
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}; give the path of a program", file=sys.stderr, flush=True)
        os._exit(1)


def _wait_for(server: int) -> int:
    while True:
        pid, status = os.wait()  # others are orphans of the server's
        if pid == server:
            return status


def _kill_what_is_left() -> None:
    """Kill children until there is none: those of one that is killed are given to this process."""
    import psutil  # only now: it is not needed while the server runs

    signal.setitimer(signal.ITIMER_REAL, 0)
    with suppress(ChildProcessError):
        while True:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            os.wait()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
