"""Engines that find us by name: what `pip install` leaves is all they need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engine import ENVIRONMENT
from tests.helpers.distributions import distribution

_toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parents[3]
ASK = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, transfer = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model, enforce_eager=True, max_model_len=256, kv_transfer_config=transfer, enable_prefix_caching=True,
              kv_cache_memory_bytes=64 << 20, block_size=32, disable_log_stats=True, skip_tokenizer_init=True)
    for turn in range(2):
        asked = SamplingParams(max_tokens=2, detokenize=False)
        [answer] = llm.generate([{"prompt_token_ids": list(range(1, 100))}], asked)
        llm.reset_prefix_cache()
    print("CACHED", answer.num_cached_tokens)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Our distribution's metadata, as pip writes it; the sources are on the path already."""
    groups = _toml.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    return distribution(tmp_path / "site", "kvtiers", groups, {"ask": ASK})


def test_the_connector_is_found_by_its_name_alone(site: Path, tmp_path: Path, model_of: Callable[[str], str]) -> None:
    transfer = {
        "kv_connector": "KVStoreConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"host": {"capacity_bytes": "64MiB"}},
    }  # fmt: skip
    (tmp_path / "connectors").mkdir()  # a folder of the user's own, behind ours on the path
    done = subprocess.run(
        [sys.executable, str(site / "ask.py"), model_of("gqa"), json.dumps(transfer)],
        env={**ENVIRONMENT, **dict(PATH="/usr/bin:/bin", PYTHONPATH=f"{ROOT}:{site}", HOME=str(tmp_path))},
        cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert "CACHED 96" in done.stdout


def test_connector_and_tier_are_in_the_factories_after_the_plugins_ran(site: Path, tmp_path: Path) -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as connectors\n"
        "from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory as tiers\n"
        "print(connectors.get_connector_class_by_name('KVStoreConnector').__module__)\n"
        "print(tiers.get_tier_class({'type': 'KVStoreTier'}).__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, **dict(PATH="/usr/bin:/bin", PYTHONPATH=f"{ROOT}:{site}", HOME=str(tmp_path))},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["connectors.vllm.connector", "connectors.vllm_tier.tier"]
