"""The GPU's check, rehearsed on the CPU: a day with a GPU is not for finding its slips."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", Path(__file__).with_name("check.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


def test_every_check_passes_in_a_rehearsal(check: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "check.json"

    assert check.main(["--device", "cpu", "--out", str(out)]) == 0

    told = json.loads(out.read_text())
    assert told["machine"]["device"] == "cpu"
    statuses = {name: one["status"] for name, one in told["checks"].items()}
    assert statuses.pop("transformers") in ("ok", "skipped")
    assert statuses == {"contract": "ok", "bandwidth": "ok", "overlap": "ok"}
    assert all(one["out_ratio"] > 0 and one["in_ratio"] > 0 for one in told["checks"]["bandwidth"]["shapes"].values())


def test_a_device_that_copies_wrongly_fails_the_check(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(check.CpuDevice):  # type: ignore[name-defined, misc]
        def copy_in(self, table: Any, page_ids: Any, slots: Any) -> Any:
            return super().copy_in(table, list(page_ids)[::-1], slots)

    monkeypatch.setattr(check, "CpuDevice", Wrong)
    monkeypatch.setattr(check, "CHECKS", (check.contract,))

    told = check.run("cpu", 60.0)

    assert told["checks"]["contract"]["status"] == "failed"
    assert "scatter" in told["checks"]["contract"]["error"]


def test_what_does_not_begin_in_time_is_told_as_skipped(check: ModuleType) -> None:
    told = check.run("cpu", -1.0)

    assert {one["status"] for one in told["checks"].values()} == {"skipped"}
