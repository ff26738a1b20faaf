"""Paths in settings: what may be written, and what it means.

    ~/kv, ~name/kv        a user's home directory
    $NAME/kv, ${NAME}/kv  the environment, wherever the setting itself comes from
    kv, ./kv              below the directory of the file that says so; elsewhere below the working directory

So a path is absolute once it is read, and `kvstore config` shows which one it is. What looks like a mistake is refused:
quotes that an env file kept, a URL, a Windows path, a variable that is not set, a control character. Spaces and line
ends around a path go away.

Functions raise ValueError with the end of a sentence that begins with the field and its value.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_SOCKET_BYTES = 107  # sun_path of Linux without its closing zero
_MAX_NAME_BYTES = 255  # of every filesystem in use
_MAX_PATH_BYTES = 4095

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_WINDOWS = re.compile(r"[A-Za-z]:([\\/]|$)|.*\\")
_LEFT = re.compile(r"\$(\w+|\{[^}]*\}?|\([^)]*\)?)")
_QUOTES = "\"'`"


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute path that a setting means. Raises ValueError."""
    text = expanded(os.fspath(path))
    if not text.startswith("/"):
        try:
            return Path(os.getcwd()) / text
        except OSError as error:
            raise ValueError(
                f"it is relative, and the working directory is gone ({error.strerror}); give an absolute path"
            ) from None
    return Path(text)


def expanded(text: str) -> str:
    """The path with homes and variables in it put in; still relative if it was. Raises ValueError."""
    text = text.strip()
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("it has a control character in it; give the path alone")
    if text[:1] in _QUOTES or text[-1:] in _QUOTES:
        raise ValueError("its quotes are part of the value (docker's --env-file keeps them); write the path without")
    if _WINDOWS.match(text):
        raise ValueError("it looks like a path of Windows; this runs where the parts of a path are joined by /")
    scheme = _SCHEME.match(text)
    if scheme:
        rest = "/" + text[scheme.end() :].lstrip("/")
        raise ValueError(f"it is a path, and not a URL: write {rest}")
    text = _home(_variables(text))
    if not text:
        raise ValueError("it is empty; give a path, or none")
    too_long = max((len(os.fsencode(part)) for part in text.split("/")), default=0) > _MAX_NAME_BYTES
    if too_long or len(os.fsencode(text)) > _MAX_PATH_BYTES:
        raise ValueError(f"it is too long: {_MAX_NAME_BYTES} bytes for a part, {_MAX_PATH_BYTES} for all")
    return text


def socket(path: Path) -> Path:
    """A path that a unix socket can have. Raises ValueError."""
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_SOCKET_BYTES:
        raise ValueError(f"it has {num_bytes} bytes; a unix socket's path has at most {MAX_SOCKET_BYTES}")
    return path


def below(folder: Path, value: object) -> object:
    """The value of a path setting that stands in a file of `folder`, with a relative path made one below it.

    Anything else, and what is wrong, stays as it is, so that the error shows what was written.
    """
    if not isinstance(value, str) or value.strip().lower() in ("", "none", "off"):
        return value
    try:
        text = expanded(value)
    except ValueError:
        return value
    return text if text.startswith("/") else str(folder / text)


def shown(text: str) -> str:
    """The text with what no terminal can print (bytes that are not UTF-8) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _variables(text: str) -> str:
    text = os.path.expandvars(text)
    left = _LEFT.search(text)
    if left is None:
        return text
    if left[0].startswith("$("):
        raise ValueError(f"{left[0]} was not replaced: Kubernetes does so only for variables that stand before it")
    raise ValueError(f"{left[0]} is not set in this process's environment")


def _home(text: str) -> str:
    if not text.startswith("~"):
        return text
    home = os.path.expanduser(text)
    if not home.startswith("/") or (home.startswith("/~")):
        name = text.partition("/")[0]
        raise ValueError(f"{name} is the home of nobody here (HOME is not set, or there is no such user); write it out")
    return home
