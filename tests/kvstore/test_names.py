"""Our four names, taken by somebody else: told with both places and the way out, wherever it is met."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import names
from tests.helpers.distributions import distribution

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, path: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "COLUMNS": "300"},
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


def package(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    return folder / name


@pytest.mark.parametrize("name", ["radix", "eviction"])
def test_a_package_that_hides_ours_is_named_when_kvstore_is_imported(tmp_path: Path, name: str) -> None:
    other = package(tmp_path / "site", name)

    done = run("-c", "import kvstore.build", path=f"{tmp_path / 'site'}:{ROOT}", cwd=tmp_path)

    told = done.stderr.splitlines()[-1]
    assert told.startswith(
        f"ImportError: kvtiers: the name {name} leads to {other}, not to kvtiers's own {ROOT / name}: "
    )
    assert f"take {tmp_path / 'site'} off the path" in told


def test_a_folder_of_the_working_directory_is_told_as_such(tmp_path: Path) -> None:
    package(tmp_path, "radix")

    done = run("-c", "import kvstore", path=f":{ROOT}", cwd=tmp_path)

    assert done.stderr.rstrip().endswith("start from another directory, or rename that folder")


def test_the_distribution_that_brings_it_is_named(tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", "py-radix", {}, {})
    package(site, "radix")
    (site / "py_radix-1.0.dist-info" / "top_level.txt").write_text("radix\n")

    done = run("-c", "import kvstore", path=f"{site}:{ROOT}", cwd=tmp_path)

    assert "py-radix installs it; run: pip uninstall py-radix; pip install --force-reinstall" in done.stderr


def test_a_name_that_nobody_uses_does_no_harm_and_a_command_that_needs_it_tells(tmp_path: Path) -> None:
    other = package(tmp_path, "connectors")

    assert run("-c", "import kvstore.build", path=f":{ROOT}", cwd=tmp_path).returncode == 0
    done = run("-m", "kvstore", "doctor", "--json", path=f":{ROOT}", cwd=tmp_path)
    assert done.returncode == 1
    assert f"the name connectors leads to {other}" in " ".join(done.stdout.split())
    done = run("-c", "import kvstore.cli as c, sys; sys.argv[1:] = ['replica', '--model', './none']; c.main()",
               path=f":{ROOT}", cwd=tmp_path)  # fmt: skip
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr


def test_another_kvstore_is_told_by_the_connectors(tmp_path: Path) -> None:
    other = package(tmp_path / "site", "kvstore")

    done = run("-c", "import connectors.vllm", path=f"{tmp_path / 'site'}:{ROOT}", cwd=tmp_path)

    assert f"the name kvstore leads to {other / '__init__.py'}, not to {ROOT / 'kvstore'}" in done.stderr


def test_ours_can_be_had_behind_a_folder_that_hides_it(tmp_path: Path) -> None:
    package(tmp_path, "connectors")
    code = "from kvstore import names; names.load_ours('connectors'); import connectors; print(connectors.__file__)"

    assert run("-c", code, path=f":{ROOT}", cwd=tmp_path).stdout.strip() == str(ROOT / "connectors" / "__init__.py")


def test_what_was_imported_already_is_not_taken_away(tmp_path: Path) -> None:
    package(tmp_path, "connectors")
    code = "import connectors; from kvstore import names; names.load_ours('connectors')"

    assert "ImportError: kvtiers: the name connectors leads to" in run("-c", code, path=f":{ROOT}", cwd=tmp_path).stderr


def test_our_names_are_ours_here() -> None:
    assert {name: names.clash(name) for name in names.PACKAGES} == dict.fromkeys(names.PACKAGES, "")
