from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.vllm import command as module
from kvstore.vllm.command import VllmSettings, command, connector_config, environment


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACCELERATORS", ())


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_with_a_daemon_the_daemons_sections_stay_away_and_the_block_size_is_vllms() -> None:
    given = {
        "host.capacity_bytes": "1GiB",
        "store.block_size": "32",
        "store.single_flight": "true",
        "service.url": "unix:///n.sock",
    }

    block_size, extra = connector_config(given, True)

    assert block_size == "32"
    assert extra == {"store": {"single_flight": "true"}, "service": {"url": "unix:///n.sock"}}


def test_without_one_all_sections_are_the_engines_own() -> None:
    assert connector_config({"host.capacity_bytes": "1GiB"}, False) == ("", {"host": {"capacity_bytes": "1GiB"}})


def test_a_setting_without_a_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="--set host: name a field of a section"):
        connector_config({"host": "1"}, False)


def test_a_python_runs_the_server_as_a_module_and_the_program_by_its_command(tmp_path: Path) -> None:
    by_python = command(VllmSettings("m", "/venv/bin/python"), 9000)
    by_program = command(VllmSettings("m", "/usr/bin/vllm"), 9000)

    assert by_python[3:8] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    assert by_program[3:6] == ["/usr/bin/vllm", "serve", "m"]
    assert json.loads(option(by_python, "--kv-transfer-config"))["kv_connector"] == "KVStoreConnector"


def test_the_users_options_come_last_and_a_directory_is_served_by_its_name(tmp_path: Path) -> None:
    words = command(VllmSettings(str(tmp_path), "/venv/bin/python", max_running=4, arguments=("--dtype", "half")), 9000)

    assert words[-2:] == ["--dtype", "half"]
    assert option(words, "--dtype") == "float32"  # no accelerator; the later one counts
    assert option(words, "--served-model-name") == tmp_path.name
    assert option(words, "--max-num-seqs") == "4"


def test_the_environment_has_the_connectors_packages_and_not_those_of_another_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somebody/elses")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")

    found = environment(VllmSettings("m", "/venv/bin/python", threads=3, file=Path("/etc/kv.toml")))

    assert found["PYTHONPATH"] == str(Path(__file__).parents[3])
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert (found["OMP_NUM_THREADS"], found["KVSTORE_CONFIG"]) == ("3", "/etc/kv.toml")


def test_an_installed_package_is_not_put_before_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", Path("/venv/lib/site-packages"))

    assert "PYTHONPATH" not in environment(VllmSettings("m", "/venv/bin/python"))
