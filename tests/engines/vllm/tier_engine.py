"""A vLLM engine with its own offloading and our secondary tier below it, as the tests drive it.

Also a command: `python -m tests.engines.vllm.tier_engine SCRIPT` runs a list of steps in a new process, with one engine
after the other, and prints one JSON line per step.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tests.engines.vllm.engine import PATIENCE, Engine
from tests.helpers.waiting import WAIT_S


def tier_config(entry: dict[str, Any], **offloading: Any) -> dict[str, Any]:
    """The kv_connector_extra_config of a CPU engine with one tier: a KVStoreTier, unless `entry` names another type."""
    ours = {"type": "KVStoreTier", "module_path": "connectors.vllm_tier", "store": PATIENCE}
    tier = entry if "type" in entry else {**ours, **entry}
    return {
        "spec_name": "CpuTieringSpec",
        "spec_module_path": "connectors.vllm_tier",
        "cpu_bytes_to_use": 64 << 20,
        "secondary_tiers": [tier],
        **offloading,
    }


class TierEngine(Engine):
    """vLLM with OffloadingConnector and our tier. Everything in one process."""

    def __init__(self, model: str, entry: dict[str, Any], offloading: dict[str, Any] | None = None, **options: Any):
        extra = tier_config(entry, **(offloading or {}))
        transfer = {"kv_connector": "OffloadingConnector", "kv_connector_module_path": None}
        super().__init__(model, extra, transfer, **options)

    @property
    def manager(self) -> Any:
        """vLLM's tiering manager."""
        return self.scheduler.connector.connector_scheduler.manager

    @property
    def tier(self) -> Any:
        """Our tier."""
        return self.manager.secondary_tiers[0]

    def settle(self, timeout_s: float = WAIT_S) -> None:
        """Let the engine step until everything computed is stored below."""
        core = self.llm.llm_engine.engine_core.engine_core
        until = time.monotonic() + timeout_s
        quiet = 0
        while quiet < 3:  # copies into host memory are begun a step after the request has ended
            assert time.monotonic() < until, "vLLM's offloading has not come to rest"
            core.step()
            quiet = 0 if self.manager.has_pending_work() else quiet + 1
            time.sleep(0.005)

    def forget(self) -> None:
        """Empty vLLM's prefix cache and its host memory, so that only our tier can help."""
        self.settle()
        assert self.llm.reset_prefix_cache(reset_connector=True)


def main() -> None:
    """Run the steps of a script: prompts to ask, "settle", "forget" or "metrics"."""
    script = json.loads(sys.argv[1])
    for entry in script["entries"]:
        engine = TierEngine(script["model"], entry)
        for step in script["steps"]:
            if isinstance(step, list):
                answer: Any = engine.ask(step)
                engine.settle()
            else:
                answer = getattr(engine, step)()
            print("ANSWER " + json.dumps(answer), flush=True)
        engine.close()
    print("CLOSED", flush=True)


if __name__ == "__main__":
    main()
