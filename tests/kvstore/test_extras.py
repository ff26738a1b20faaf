from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kvstore.extras import MissingExtra, how_to_install, missing, require, requirements

REQUIRES = [
    "numpy>=1.26",
    'tomli>=2; python_version < "3.11"',
    'torch>=2.4; extra == "transformers"',
    'transformers<6,>=5.0; extra == "transformers"',
    'kvtiers[transformers]; extra == "demo"',
    'absent-one>=0.17; extra == "demo"',
    'kvtiers[demo]; extra == "dev"',
    'absent_two>=1; python_version >= "3.10" and extra == "dev"',
]


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)


def test_an_extra_holds_those_that_it_includes(declared: None) -> None:
    assert requirements("transformers") == ["torch>=2.4", "transformers<6,>=5.0"]
    assert requirements("demo") == ["torch>=2.4", "transformers<6,>=5.0", "absent-one>=0.17"]
    assert requirements("dev")[-1] == "absent_two>=1"
    assert requirements("nonsense") == []


def test_what_is_installed_is_not_missing(declared: None) -> None:
    assert missing("dev") == ["absent-one>=0.17", "absent_two>=1"]
    assert missing("transformers") == []


def test_the_message_names_packages_that_an_index_has_and_the_extra_of_a_clone(declared: None) -> None:
    with pytest.raises(MissingExtra) as caught:
        require("dev", "the demo")

    assert str(caught.value) == (
        "the demo needs absent-one and absent_two; "
        "run: pip install 'absent-one>=0.17' 'absent_two>=1'   (in a clone: pip install '.[dev]')"
    )


def test_sources_that_were_not_installed_require_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_not_found(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", raise_not_found)

    require("demo", "the demo")
    assert how_to_install("demo") == "in a clone, run: pip install '.[demo]'"


def test_the_real_metadata_is_understood() -> None:
    assert any(item.startswith("gguf") for item in requirements("demo"))
    assert any(item.startswith("torch") for item in requirements("cluster"))
    assert missing("demo") == []


def test_no_shipped_text_tells_anybody_to_install_our_name_from_an_index() -> None:
    root = Path(__file__).resolve().parents[2]
    shipped = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("deploy/**/*")]
    shipped += [
        path for package in ("kvstore", "connectors", "radix", "eviction") for path in (root / package).rglob("*.py")
    ]

    for path in (path for path in shipped if path.is_file()):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "pip install kvtiers" not in line, f"{path}: {line}"
            assert "pip install 'kvtiers" not in line, f"{path}: {line}"
            assert 'pip install "kvtiers' not in line, f"{path}: {line}"


@pytest.mark.parametrize("command", [["demo"], ["demo", "--model", "random"], ["replica", "--model", "random"]])
def test_a_first_command_without_extras_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    # As after a plain `pip install`: the packages of the extras are not there, neither to import nor as distributions.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m, sys\n"
        "gone = ('torch', 'transformers', 'gguf', 'matplotlib', 'psutil', 'accelerate', 'safetensors')\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name in gone: raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "for name in gone: sys.modules[name] = None\n"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}

    done = subprocess.run(
        [sys.executable, "-m", "kvstore", *command], capture_output=True, text=True, env=env, timeout=100, check=False
    )

    assert done.returncode == 2, done.stderr
    assert "torch" in done.stderr
    assert "run: pip install" in done.stderr
    assert "Traceback" not in done.stderr
