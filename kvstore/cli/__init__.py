"""The command `kvstore`.

`main` is the entry point. Nothing heavier than the command-line library is imported until a command runs:
`kvstore --help` is what people wait for most often.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line of this process."""
    if os.getpid() == 1:
        # The kernel gives process 1 no signal that it has no handler for: a container that is stopped while a command
        # still imports what it needs would be waited for, and killed. Commands with an end of their own set it later.
        signal.signal(signal.SIGTERM, _end)

    from kvstore.cli.app import app

    app(prog_name="kvstore")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
