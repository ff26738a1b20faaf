"""The transformers connector through a daemon, in a process of its own: the same bits, by configuration alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from kvstore.config.sections import Config
from tests.helpers.daemons import DaemonProcess
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK = 16
CHUNK = 32
SETTINGS = ("store.load_or_recompute=false", "store.lookup_deadline_s=10", "store.load_deadline_s=30")

ENGINE = """
import json, sys
from connectors.transformers import KVCacheModel
from kvstore.config.sections import Config
from tests.helpers.tiny_models import random_ids, tiny_model

name, = sys.argv[1:]
with KVCacheModel.open(tiny_model(name), Config.load(), prefill_chunk=32) as kv:
    answer = kv.generate(random_ids(150, seed=1), 8)
    assert kv.flush(60.0)
    print(json.dumps({"tokens": answer.tokens, "sources": answer.report.sources}))
"""


def engine(name: str, socket: Path) -> dict[str, Any]:
    """An answer of a fresh process whose configuration names the daemon."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, name],
        env={"PATH": "", "KVSTORE_SERVICE__URL": f"unix://{socket}", "KVSTORE_STORE__BLOCK_SIZE": str(BLOCK)},
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        check=True,
        timeout=100,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_two_engine_processes_share_one_host_copy_of_a_prefix(tmp_path: Path, name: str) -> None:
    expected = KVCacheModel(tiny_model(name), prefill_chunk=CHUNK).generate(random_ids(150, seed=1), 8).tokens
    daemon = DaemonProcess(tmp_path / "kv.sock", None, *SETTINGS, host_pages=512)
    try:
        first = engine(name, daemon.socket)
        second = engine(name, daemon.socket)
    finally:
        code = daemon.terminate()

    assert first["tokens"] == second["tokens"] == expected
    assert first["sources"]["host"] == 0
    assert second["sources"]["host"] == 128
    assert code == 0


def test_an_engine_goes_on_when_the_daemon_is_killed_and_uses_it_again_when_it_is_back(tmp_path: Path) -> None:
    model = tiny_model("llama_gqa")
    ids = random_ids(150, seed=2)
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    expected = cold.generate(ids, 8).tokens
    daemon = DaemonProcess(tmp_path / "kv.sock", tmp_path / "disk", *SETTINGS, host_pages=512)
    try:
        config = Config(service={"url": f"unix://{daemon.socket}"}, store={"block_size": BLOCK})
        with KVCacheModel.open(model, config, prefill_chunk=CHUNK) as kv:
            store: Any = kv.connector._store  # type: ignore[union-attr]
            assert kv.generate(ids, 8).tokens == expected
            assert kv.flush(WAIT_S)
            assert store.flush(WAIT_S)
            daemon.kill()

            answers = [kv.generate(ids, 8) for _ in range(2)]
            assert [answer.tokens for answer in answers] == [expected, expected]
            assert [answer.report.reused_tokens for answer in answers] == [0, 0]
            assert kv.flush(WAIT_S)

            daemon.start()
            for _ in range(100):
                answer = kv.generate(ids, 8)
                assert answer.tokens == expected
                if answer.report.reused_tokens:
                    break
            assert answer.report.reused_tokens == 128
            assert store.num_attached == 2
            assert kv.connector is not None
            assert kv.connector.counters.load_failures == kv.connector.counters.save_failures == 0
    finally:
        daemon.kill()
