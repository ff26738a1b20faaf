from __future__ import annotations

from pathlib import Path

import pytest

from eviction.registry import POLICIES
from kvstore.config.reference import effective, markdown
from kvstore.config.sections import Config
from kvstore.config.sources import variable

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("nothing_configured")


def test_effective_lists_every_field_once_with_unit_and_description() -> None:
    rows = effective(
        Config.load(host={"capacity_bytes": "1.5GiB"}, disk={"path": "/data"}, store={"touch_interval_s": 90})
    )
    text = {row.field: row.text for row in rows}

    assert len(text) == len(rows) > 30
    assert text["host.capacity_bytes"] == "1.5 GiB"
    assert text["store.touch_interval_s"] == "1.5 min"
    assert text["disk.path"] == "/data"
    assert text["host.huge_pages"] == "true"
    assert [row.field for row in rows if not row.description.endswith(".")] == []


def test_every_field_can_be_set_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = effective(Config())
    for row in rows:
        monkeypatch.setenv(variable(row.field), "none" if row.value is None else str(row.value))

    loaded = effective(Config.load())

    assert [row.value for row in loaded] == [row.value for row in rows]
    assert [row.source for row in loaded] == [f"environment {variable(row.field)}" for row in rows]


def test_reference_names_every_field_with_its_bounds_and_choices() -> None:
    text = markdown()

    assert all(f"| `{row.field.partition('.')[2]}` |" in text for row in effective(Config()))
    assert "| `capacity_bytes` | 1 GiB | ≥ 4 KiB |" in text
    assert "| `load_deadline_s` | 2 s | > 0 s, ≤ 10 min |" in text
    assert all(f"`{policy}`" in text for policy in POLICIES)


def test_written_documentation_is_the_reference_of_today() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()

    assert markdown().strip() in page, "run: kvstore config --markdown, and put it into docs/configuration.md"
