"""Policies of somebody else: by entry point, or by their place in the configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eviction.lru import Lru
from kvstore import policies
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from tests.helpers.distributions import distribution

ROOT = Path(__file__).resolve().parents[2]
FIFO = """
from eviction.lru import Lru


class Fifo(Lru):
    def touch(self, keys, now):
        pass


class Half:
    def add(self, keys, now, hint=None): ...


def broken():
    raise RuntimeError("out of order")


NOT_CALLABLE = 3
"""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = distribution(
        tmp_path / "site",
        "kvtiers-fifo",
        {policies.GROUP: {"fifo": "fifo_policy:Fifo", "half": "fifo_policy:Half", "lru": "fifo_policy:Fifo"}},
        {"fifo_policy": FIFO},
    )
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("fifo_policy", None)


@pytest.mark.parametrize("name", ["fifo", "fifo_policy:Fifo"])
def test_a_policy_of_another_distribution_is_taken_by_name_and_by_place(name: str) -> None:
    config = Config(host={"policy": name}, disk={"policy": name})

    policy = policies.make_policy(config.host.policy)
    policy.add("ab", 0.0)
    policy.touch("a", 1.0)

    assert policy.victims(1) == ["a"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("half", r"eviction policy half \(fifo_policy:Half of distribution kvtiers-fifo 1.0\) makes a Half without "),
        ("fifo_policy:Half", r"\(fifo_policy:Half\) makes a Half without demote, discard"),
        ("fifo_policy:broken", "cannot be made without arguments: RuntimeError: out of order"),
        ("fifo_policy:NOT_CALLABLE", "is int; it must be a class"),
        ("fifo_policy:Nothing", "cannot be imported: AttributeError"),
        ("no_such_module:X", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("fifo policy:X", "it must be package.module:Class"),
        ("fiffo", "it must be one of fifo, half, lru, outlook, s3fifo, sieve, or package.module:Class"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_setting(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Config(host={"policy": name})

    assert str(caught.value).startswith(f"host.policy is {name!r} (from keyword argument); ")


def test_a_name_of_ours_stays_ours_and_the_thief_is_told() -> None:
    assert policies.find_policy("lru") is Lru
    assert any("fifo_policy:Fifo of distribution kvtiers-fifo" in told for told in policies.problems())


def test_the_command_takes_it_as_well(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", "config", "--set=host.policy=fifo", "--set=disk.policy=fifo_policy:Fifo"],
        env={"PYTHONPATH": f"{ROOT}:{site}", "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True, text=True, check=False, cwd=site,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "fifo_policy:Fifo" in done.stdout
