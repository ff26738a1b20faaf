"""The DIR of `inspect` and `verify`: is it one of ours, and may we read it?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvstore.errors import ConfigError

MAX_NAMED = 20  # directories in a message

Directory = Annotated[
    Path,
    # readable=False: whether it can be read is checked below, with an answer that says what to do.
    typer.Argument(metavar="DIR", help="Directory of a disk tier (disk.path), in use or not.", readable=False),
]


def check_directory(path: Path) -> None:
    """Raise ConfigError, saying what to do, for what is not a readable directory of a disk tier."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give the directory of a disk tier (disk.path, see kvstore config)")
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; give the directory of a disk tier (disk.path)")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be read: permission denied; run this as the user that owns it")
    if not (path / "index").is_dir():
        found = sorted(
            index.parent for depth in ("*", "*/*") for index in path.glob(f"{depth}/index") if index.is_dir()
        )
        hint = "".join(f"\n  {directory}" for directory in found[:MAX_NAMED])
        below = f"; a daemon keeps one for each tenant and namespace, and here are {len(found)}:{hint}" if found else ""
        raise ConfigError(f"{path} is not the directory of a disk tier: there is no index/ in it{below}")
