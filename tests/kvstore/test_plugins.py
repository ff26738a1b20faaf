"""Entry points of other distributions: found by name, told when they are wrong, and harmless to the rest."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kvstore import policies
from kvstore.errors import ConfigError
from kvstore.plugins import Plugins, missing_members
from kvstore.tiers import registry
from kvstore.tiers.base import Tier
from kvstore.tiers.memory import MemoryTier
from tests.helpers.distributions import distribution

_toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parents[2]
GROUP = "kvtiers.tests"


def number(name: str, found: object) -> int:
    if not isinstance(found, int):
        raise TypeError(f"is {type(found).__name__}; it must be a number")
    return found


@pytest.fixture
def plugins() -> Plugins[int]:
    return Plugins(GROUP, "number", {"ours": "kvstore.plugins:NUMBER"}, number, taken=("host",))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_plugin_of_another_distribution_is_found_by_name(plugins: Plugins[int], site: Path) -> None:
    distribution(site, "kvtiers-seven", {GROUP: {"seven": "sevens:SEVEN"}}, {"sevens": "SEVEN = 7"})

    assert plugins.names() == ("ours", "seven")
    assert "sevens" not in sys.modules  # a name is known without an import
    assert plugins.get("seven") == 7
    assert plugins.get("eight") is None


@pytest.mark.parametrize(
    ("value", "source", "told"),
    [
        ("sevens:SEVEN", "import nothing_of_this_name", "cannot be imported: ModuleNotFoundError: No module named"),
        ("sevens:SEVEN", "raise SystemError('no')", "cannot be imported: SystemError: no"),
        ("sevens:EIGHT", "SEVEN = 7", "cannot be imported: AttributeError"),
        ("sevens:SEVEN", "SEVEN = 'seven'", "is str; it must be a number"),
    ],
)
def test_a_broken_one_is_named_with_distribution_and_attribute_and_the_rest_goes_on(
    plugins: Plugins[int], site: Path, value: str, source: str, told: str
) -> None:
    distribution(site, "kvtiers-seven", {GROUP: {"seven": value}}, {"sevens": source})
    distribution(site, "kvtiers-nine", {GROUP: {"nine": "nines:NINE"}}, {"nines": "NINE = 9"})

    with pytest.raises(ConfigError) as caught:
        plugins.get("seven")

    assert str(caught.value).startswith(f"number seven ({value} of distribution kvtiers-seven 1.0) ")
    assert told in str(caught.value)
    assert plugins.get("nine") == 9
    assert plugins.all() == {"nine": 9}
    assert str(caught.value) in plugins.problems()


@pytest.mark.parametrize(("name", "why"), [("ours", "in use"), ("host", "in use"), ("A-b", "made of a-z")])
def test_a_name_that_cannot_be_had_is_told_and_left_out(plugins: Plugins[int], site: Path, name: str, why: str) -> None:
    distribution(site, "kvtiers-thief", {GROUP: {name: "thieves:X"}}, {"thieves": "X = 1"})

    assert plugins.names() == ("ours",)
    assert "thieves" not in sys.modules
    [told] = [told for told in plugins.problems() if "thieves:X of distribution kvtiers-thief 1.0" in told]
    assert why in told


def test_a_name_that_two_distributions_claim_is_nobodys(plugins: Plugins[int], site: Path) -> None:
    distribution(site, "kvtiers-a", {GROUP: {"both": "as_:X"}}, {"as_": "X = 1"})
    distribution(site, "kvtiers-b", {GROUP: {"both": "bs_:X"}}, {"bs_": "X = 2"})

    with pytest.raises(ConfigError, match=r"kvtiers-a 1\.0 and bs_:X of distribution kvtiers-b 1\.0; uninstall one"):
        plugins.get("both")


def test_the_metadata_of_our_distribution_says_what_the_tables_say() -> None:
    groups = _toml.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]

    assert groups[registry.GROUP] == registry.OURS
    assert groups[policies.GROUP] == policies.OURS


def test_ours_are_found_with_and_without_metadata(site: Path) -> None:
    assert registry.names() == tuple(registry.OURS)
    distribution(site, "kvtiers", {registry.GROUP: registry.OURS}, {})
    assert registry.names() == tuple(registry.OURS)
    assert registry.problems() == []


def test_members_that_an_object_lacks_are_named() -> None:
    assert missing_members(MemoryTier(1, 4096), Tier) == []
    assert "read_into" in missing_members(object(), Tier)
