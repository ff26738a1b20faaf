"""The hooks of vLLM and SGLang, called in all their processes: light, silent, and in time for their factories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONNECTOR = "vllm/distributed/kv_transfer/kv_connector/factory.py"
TIER = "vllm/v1/kv_offload/tiering/factory.py"
FACTORIES = {
    CONNECTOR: "class KVConnectorFactory:\n    _registry = {}\n    @classmethod\n"
    "    def register_connector(cls, *given): cls._registry[given[0]] = given[1:]\n",
    TIER: "class SecondaryTierFactory:\n    _registry = {}\n    @classmethod\n"
    "    def register_tier(cls, *given): cls._registry[given[0]] = given[1:]\n",
}
LOAD = """
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
"""
TELL = "print(KVConnectorFactory._registry, SecondaryTierFactory._registry)"
KNOWN = "{'KVStoreConnector': ('kvstore.engines', 'KVStoreConnector')} " + (
    "{'KVStoreTier': ('kvstore.engines', 'KVStoreTier')}"
)
REGISTER = "from kvstore.engines import register; register(); register()\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A vLLM that has nothing but its two factories."""
    for name, source in FACTORIES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def run(site: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{site}"}, capture_output=True, text=True, check=False, cwd=site,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_factories_that_are_loaded_already_are_told_at_once(site: Path) -> None:
    assert run(site, LOAD + REGISTER + TELL) == KNOWN


def test_factories_that_vllm_loads_later_are_told_then_and_keep_their_loaders(site: Path) -> None:
    code = REGISTER + LOAD + TELL + "\nimport inspect; print('_registry' in inspect.getsource(KVConnectorFactory))"
    watching = "\nimport sys; print([type(finder).__name__ for finder in sys.meta_path if 'Watch' in repr(finder)])"

    assert run(site, code + watching).splitlines() == [KNOWN, "True", "[]"]


def test_the_hook_imports_nothing_of_vllm_and_nothing_heavy(site: Path) -> None:
    code = (
        REGISTER + "import sys; print(sorted({'vllm', 'numpy', 'pydantic', 'radix', 'connectors'} & set(sys.modules)))"
    )

    assert run(site, code) == "[]"


@pytest.mark.parametrize("broken", ["", "class KVConnectorFactory: pass\n"])
def test_another_vllm_is_left_alone(site: Path, broken: str) -> None:
    (site / CONNECTOR).write_text(broken)

    run(site, REGISTER + "import vllm.distributed.kv_transfer.kv_connector.factory")
    (site / CONNECTOR).unlink()
    run(site, REGISTER + "import vllm")


SGLANG = """
class StorageBackendFactory:
    @classmethod
    def _create_dynamic_backend(cls, backend_config, storage_config, mem_pool_host):
        return backend_config["module_path"], backend_config["class_name"]
"""
ASK = """
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory as factory
print(*[factory._create_dynamic_backend(config, None, None) for config in (
    {"backend_name": "KVStoreBackend"}, {"backend_name": "other", "module_path": "m", "class_name": "C"})])
import sys; print([type(finder).__name__ for finder in sys.meta_path if "Watch" in repr(finder)])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_sglangs_factory_needs_no_more_than_the_name_of_our_backend(tmp_path: Path, when: str) -> None:
    path = tmp_path / "sglang/srt/mem_cache/storage/backend_factory.py"
    path.parent.mkdir(parents=True)
    path.write_text(SGLANG)
    register = "from kvstore.engines import register_sglang; register_sglang(); register_sglang()\n"
    load = "import sglang.srt.mem_cache.storage.backend_factory\n" if when == "after" else ""

    told = run(tmp_path, load + register + ASK).splitlines()

    assert told == ["('kvstore.engines', 'KVStoreBackend') ('m', 'C')", "[]"]
