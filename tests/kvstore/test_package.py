from __future__ import annotations

import subprocess
import sys

import pytest

import kvstore


@pytest.mark.parametrize("name", kvstore.__all__)
def test_what_the_package_promises_is_there(name: str) -> None:
    assert getattr(kvstore, name) is not None


def test_a_wrong_name_is_told_as_python_tells_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvstore.nothing


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, kvstore; print([m for m in ('numpy', 'torch', 'redis', 'lmdb', 'pydantic') if m in sys.modules])"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "[]"
