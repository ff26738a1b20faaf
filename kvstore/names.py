"""Whether the four names that this distribution installs are still ours.

`radix`, `eviction`, `kvstore` and `connectors` are common words: another distribution (PyPI's py-radix) may bring one
of them, or a folder of the working directory may come first on the path. What follows is an import error far from its
cause, so it is told here, with both places and the way out. `kvstore` looks at the first two when it is imported; the
commands and `kvstore doctor` at all.
"""

from __future__ import annotations

import os
import sys
from importlib import util
from pathlib import Path

PACKAGES = ("radix", "eviction", "kvstore", "connectors")
DISTRIBUTION = "kvtiers"
ROOT = Path(__file__).resolve().parents[1]


def place(name: str) -> Path | None:
    """Return the folder, or the file, that a top-level name leads to; None if to nothing. Imports nothing."""
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec, made by hand
        return None
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [])
    found = places[0] if places else spec.origin
    return None if found is None else Path(found).resolve()


def clash(name: str) -> str:
    """Return what is wrong with one of our names, with both places and the way out; "" if it is ours."""
    found, ours = place(name), ROOT / name
    if found == ours:
        return ""
    if found is None:
        return f"the name {name} leads nowhere, not to {ours}: install {DISTRIBUTION} anew, or set PYTHONPATH={ROOT}"
    return f"the name {name} leads to {found}, not to {DISTRIBUTION}'s own {ours}: {_way_out(name, found)}"


def _way_out(name: str, found: Path) -> str:
    others = owners(name)
    if others:
        return (
            f"{' and '.join(others)} installs it; run: pip uninstall {' '.join(others)}; pip install --force-reinstall "
            f"--no-deps {DISTRIBUTION} (or keep them in virtual environments of their own)"
        )
    if found.parent == Path(os.getcwd()).resolve():
        return "start from another directory, or rename that folder"
    return f"take {found.parent} off the path (PYTHONPATH), put {ROOT} before it, or rename that folder"


def owners(name: str) -> list[str]:
    """Return other distributions that install a top-level package of this name. Reads the metadata of all."""
    from importlib import metadata  # 60 modules, for an error

    return sorted({other for other in metadata.packages_distributions().get(name, ()) if other != DISTRIBUTION})


def require(*names: str) -> None:
    """Raise ImportError unless these names are ours."""
    told = [problem for name in names if (problem := clash(name))]
    if told:
        raise ImportError("kvtiers: " + "; ".join(told))


def load_ours(name: str) -> None:
    """Make a name of ours mean ours in this process, whatever comes first on the path.

    Raises ImportError if another was imported under it already.
    """
    if name in sys.modules or not clash(name):
        require(name)
        return
    ours = ROOT / name
    spec = util.spec_from_file_location(name, ours / "__init__.py", submodule_search_locations=[str(ours)])
    if spec is None or spec.loader is None:
        raise ImportError(clash(name))
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
