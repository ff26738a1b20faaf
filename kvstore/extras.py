"""Optional packages: which of an extra's are missing, and what to run to have them.

The extras are those of pyproject.toml; their requirements are read from the installed distribution's own metadata, so
that what a message says cannot go stale. Commands ask before they start; a message names the packages themselves, which
an index has, and the extra for a clone, since this distribution is on no index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kvstore.errors import KVStoreError

DISTRIBUTION = "kvtiers"

# "gguf>=0.17; extra == 'demo'": name and versions, then the extra.
_OF_EXTRA = re.compile(r"""^\s*([^;]+?)\s*;.*\bextra\s*==\s*["']([\w-]+)["']\s*$""")
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*")
_OURS = re.compile(rf"^{DISTRIBUTION}\[([\w,-]+)\]$")


class MissingExtra(KVStoreError):
    """Optional packages that a command needs are not installed; the message says which and how to get them."""


def require(extra: str, what: str) -> None:
    """Raise MissingExtra if a package of `extra` is not installed.

    what: the subject of the message, such as "the demo".
    """
    absent = missing(extra)
    if absent:
        raise MissingExtra(f"{what} needs {_join(_name(item) for item in absent)}; {how_to_install(extra, absent)}")


def missing(extra: str) -> list[str]:
    """Return the requirements of `extra`, as "gguf>=0.17", whose package is not installed. Compares no versions."""
    return [requirement for requirement in requirements(extra) if not _is_installed(_name(requirement))]


def requirements(extra: str) -> list[str]:
    """Return all requirements of `extra`, those of the extras that it includes too; [] where there is no metadata."""
    from importlib import metadata  # 60 modules, for those who lack something

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # sources that were not installed
        return []
    found: dict[str, None] = {}
    for line in lines:
        match = _OF_EXTRA.match(line)
        if match is None or match[2] != extra:
            continue
        included = _OURS.match(match[1].replace(" ", ""))
        if included is None:
            found[match[1]] = None
        else:
            found.update(dict.fromkeys(item for name in included[1].split(",") for item in requirements(name)))
    return list(found)


def how_to_install(extra: str, absent: Iterable[str] = ()) -> str:
    """Return the end of a message: "run: pip install ..." with the packages themselves, or the extra from a clone."""
    packages = " ".join(f"'{item}'" for item in absent or requirements(extra))
    from_clone = f"pip install '.[{extra}]'"
    return f"run: pip install {packages}   (in a clone: {from_clone})" if packages else f"in a clone, run: {from_clone}"


def _name(requirement: str) -> str:
    match = _NAME.match(requirement)
    return match[0] if match else requirement


def _is_installed(name: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _join(names: Iterable[str]) -> str:
    found = list(names)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"
