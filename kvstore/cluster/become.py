"""A program in a process's place: `python -m kvstore.cluster.become PROGRAM ARGUMENTS`.

It gets a SIGTERM when the process that started it has ended, however that ended. Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h; Linux only, elsewhere a program may survive us


def become(command: list[str]) -> NoReturn:
    """Run a command in this process's place."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before that was said
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}; give the path of a program")


if __name__ == "__main__":
    become(sys.argv[1:])
