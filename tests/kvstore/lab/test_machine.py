from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kvstore.lab import machine as module
from kvstore.lab.machine import machine, package_version, versions


def test_machine_is_described_by_plain_numbers_and_text() -> None:
    facts = machine()

    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert isinstance(facts["memory_bytes"], int)
    assert facts["memory_bytes"] > 1 << 28
    assert facts["cpu"]


def test_machine_without_proc_is_described_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)

    facts = machine()

    assert facts["memory_bytes"] is None
    assert facts["cpu"]


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBRARIES", ("numpy", "no-such-library"))

    assert versions() == {
        "python": sys.version.split()[0],
        "kvtiers": package_version(),
        "numpy": metadata.version("numpy"),
    }


def test_source_tree_that_was_never_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTRIBUTION", "no-such-distribution")

    assert package_version() == "0+source"
