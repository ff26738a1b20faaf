from __future__ import annotations

import json
import re
from pathlib import Path

from kvstore import palette
from kvstore.demo import plot as demo_plot
from kvstore.load import plot
from kvstore.service.dashboard import kinds
from kvstore.tiers import registry

ROOT = Path(__file__).resolve().parents[2]


def test_the_dashboards_style_sheet_has_the_colours_of_the_tiers() -> None:
    [sheet] = ROOT.glob("kvstore/service/**/page.css")
    light = sheet.read_text().partition("@media")[0] + kinds.sheet().decode().partition("@media")[0]

    found = dict(re.findall(r"--(host|disk|redis): (#[0-9a-f]{6});", light))

    assert found == palette.TIERS


def test_pictures_have_the_colours_of_the_tiers() -> None:
    for colors in (demo_plot.COLORS, plot.COLORS):
        assert {tier: colors[tier] for tier in palette.TIERS} == palette.TIERS
        assert not {color for name, color in colors.items() if name not in {*palette.TIERS, "cached"}} & {
            *palette.TIERS.values()
        }


def test_grafana_colours_every_series_of_a_tier() -> None:
    board = json.loads((ROOT / "deploy/grafana/dashboards/kvstore.json").read_text())
    panels = [p for p in board["panels"] if any("{{tier}}" in t.get("legendFormat", "") for t in p.get("targets", []))]

    assert panels
    for panel in panels:
        rules = {
            rule["matcher"]["options"]: rule["properties"][0]["value"] for rule in panel["fieldConfig"]["overrides"]
        }
        for tier, color in palette.TIERS.items():
            assert rules[f"/(^| ){tier}( |,|$)/"] == {"mode": "fixed", "fixedColor": color}, panel["title"]


def test_the_registry_has_the_colours_of_our_tiers() -> None:
    assert {"host": palette.HOST, **{name: kind.color for name, kind in registry.kinds().items()}} == palette.TIERS
