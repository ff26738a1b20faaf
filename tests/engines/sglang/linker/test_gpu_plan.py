"""The GPU run's arguments are SGLang's own."""

from __future__ import annotations

import json

import pytest
from sglang.srt.arg_groups.hicache_hook import handle_hicache
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.unified_cache.linker_config import UnifiedCacheLinkerConfig
from sglang.srt.server_args import ServerArgs

from connectors.sglang.config import parse_backend_config
from tests.gpu import sglang_engine


@pytest.mark.parametrize("seat", sglang_engine.SEATS)
def test_sglang_takes_the_arguments_of_the_gpu_run(seat: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sglang_engine.main(["--dry-run", "--seat", seat]) == 0
    arguments = json.loads(capsys.readouterr().out)["seats"][seat]

    handle_hicache(ServerArgs(**arguments))  # which takes no argument that it does not know
    if seat == "linker":
        UnifiedCacheLinkerConfig.from_dict(arguments["unified_cache_external_linker_config"])
    else:
        extra, *_ = HybridCacheController.parse_storage_backend_extra_config(
            arguments["hicache_storage_backend_extra_config"]
        )
        assert parse_backend_config(extra).store.disk.path is not None
