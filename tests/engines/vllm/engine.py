"""One vLLM engine in this process (or with its core in another one), as the tests drive it.

Also a command, which `EngineProcess` starts: an engine in a new process, which has never seen the prompts before. It
reads one JSON line per call and prints one per answer.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.waiting import WAIT_S

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
BLOCK = 32
# Engines compute in float32 unless a test says otherwise: there, answers to one prompt that was cut at other places, in
# chunks or among others differ by 1e-5, and nothing hides in rounding (replies.py). bfloat16 has tests of its own.
DTYPE = "float32"
PAGE_BYTES = 4 * 2 * 2 * 64 * 4 * BLOCK  # of the "gqa" model: 4 layers of K and V of 2 heads of 64, in float32
LIKELY = 5  # of how many tokens at each place the log probability is told
# The machine may be busy, and its disk slower than computing: what is tested is not speed.
PATIENCE = {"lookup_deadline_s": 10.0, "load_deadline_s": 30.0}
STORE = {**PATIENCE, "load_or_recompute": False}
ANSWER = "ANSWER "  # what a line of the pipe begins with; vLLM prints there too


def transfer_config(extra: dict[str, Any] | None, **changes: Any) -> dict[str, Any] | None:
    """The `kv_transfer_config` of an engine with our connector; None for one without."""
    if extra is None:
        return None
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
        **changes,
    }


def make_prompt(num_tokens: int, seed: int) -> list[int]:
    """Random token ids without the special ones."""
    numbers = random.Random(seed)
    return [numbers.randrange(3, 2048) for _ in range(num_tokens)]


class Engine:
    """A vLLM engine for tests: greedy, eager, on CPU.

    extra: kv_connector_extra_config; None runs vLLM without us.
    """

    def __init__(
        self, model: str, extra: dict[str, Any] | None, transfer: dict[str, Any] | None = None, **options: Any
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        values: dict[str, Any] = {
            "dtype": DTYPE,
            "max_model_len": 4096,
            "enforce_eager": True,
            "max_num_seqs": 8,
            "block_size": BLOCK,
            "disable_log_stats": False,
            "kv_transfer_config": transfer_config(extra, **(transfer or {})),
        }
        self.llm = LLM(model=model, **{**values, **options})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 8,
        transfer: Sequence[Any] | None = None,
        **fields: Any,
    ) -> list[dict[str, Any]]:
        """Greedy tokens of each prompt, their log probabilities and those of the likeliest tokens at each place (by
        name, as JSON has them), how many prompt tokens were cached, the `kv_transfer_params` that came back, and the
        time of the whole call.

        transfer: the `kv_transfer_params` of each prompt.
        """
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                logprobs=LIKELY,
                extra_args=None if params is None else {"kv_transfer_params": params},
            )
            for params in transfer or [None] * len(prompts)
        ]
        inputs = [{"prompt_token_ids": list(prompt), **fields} for prompt in prompts]
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                **_logprobs(output.outputs[0]),
                "cached": output.num_cached_tokens or 0,
                "finish": output.outputs[0].finish_reason,
                "told": output.kv_transfer_params,
                "wall_s": wall,
                "cpu_s": cpu,
            }
            for output in outputs
        ]

    def ask(self, prompt: Sequence[int], max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
        """One prompt."""
        return self.generate([prompt], max_tokens, **fields)[0]

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler; only with everything in one process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def half(self) -> Any:
        """Our scheduler's half; only with everything in one process."""
        return self.scheduler.connector._scheduler

    @property
    def worker(self) -> Any:
        """Our worker's half; only with everything in one process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def settle(self, timeout_s: float = WAIT_S) -> None:
        """Wait until what was saved is published and written behind; only with everything in one process."""
        until = time.monotonic() + timeout_s
        core = self.llm.llm_engine.engine_core.engine_core
        while self.half.is_saving and time.monotonic() < until:
            core.step()
            time.sleep(0.002)
        store = self.half.store
        while _is_writing(store.flush(1.0)) and store.slots.slabs:  # none: its daemon is gone
            assert time.monotonic() < until
            time.sleep(0.01)  # a daemon that was killed may only seem silent for a moment

    def forget_own_cache(self, reset_connector: bool = False) -> None:
        """Empty vLLM's prefix cache, so that only the store can help."""
        if self.llm.llm_engine.vllm_config.kv_transfer_config is not None and self.is_in_process:
            self.settle()
        until = time.monotonic() + WAIT_S
        while not self.llm.reset_prefix_cache(reset_connector=reset_connector):
            assert time.monotonic() < until, "vLLM's blocks are still in use"
            time.sleep(0.01)

    @property
    def is_in_process(self) -> bool:
        """True if the scheduler is an object of this process."""
        return hasattr(self.llm.llm_engine.engine_core, "engine_core")

    def metrics(self) -> dict[str, float]:
        """vLLM's metrics, summed by name."""
        totals: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if hasattr(metric, "value"):
                labels = dict(metric.labels)
                tail = labels.get("tier") or labels.get("source") or labels.get("state")
                name = f"{metric.name}.{tail}" if tail else metric.name
                totals[name] = totals.get(name, 0.0) + float(metric.value)
        return totals

    def close(self) -> None:
        """Stop the engine: all that was saved is written behind, this process can have another one. Idempotent."""
        if not hasattr(self, "llm"):
            return
        if self.is_in_process and self.scheduler.connector is not None:
            self.settle()
        in_process = self.is_in_process
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if in_process:
            clean_up()


def _is_writing(flushed: Any) -> bool:
    """Whether pages or deletes are on their way; what a tier refuses, or what waits for it to come back, is not."""
    owed = (*flushed.missing.values(), *flushed.undeleted.values())
    return bool(flushed.error) or any("waiting" in reasons for reasons in owed)


def _logprobs(output: Any) -> dict[str, Any]:
    places = output.logprobs or []
    return {
        "logprobs": [place[token].logprob for token, place in zip(output.token_ids, places, strict=True)],
        "likely": [{str(token): one.logprob for token, one in place.items()} for place in places],
    }


def clean_up() -> None:
    """Undo what an engine of this process, started or not, has left in vLLM's globals."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()


class EngineProcess:
    """An `Engine` in a process of its own; the same calls, over a pipe. Use it as a context manager."""

    def __init__(self, model: str, extra: dict[str, Any] | None, *, processes: bool = False, **values: Any) -> None:
        settings = json.dumps({"model": model, "extra": extra, **values})
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.vllm.engine", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[3],
        )

    @property
    def pid(self) -> int:
        """Of the process; without `processes` everything is in it."""
        return self._process.pid

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> list[dict[str, Any]]:
        """As Engine.generate."""
        answers: list[dict[str, Any]] = self._call("generate", [list(p) for p in prompts], max_tokens)
        return answers

    def ask(self, prompt: Sequence[int], max_tokens: int = 8) -> dict[str, Any]:
        """One prompt."""
        return self.generate([prompt], max_tokens)[0]

    def metrics(self) -> dict[str, float]:
        """As Engine.metrics."""
        values: dict[str, float] = self._call("metrics")
        return values

    def forget_own_cache(self, reset_connector: bool = False) -> None:
        """As Engine.forget_own_cache."""
        self._call("forget_own_cache", reset_connector)

    def close(self) -> None:
        """Stop it; everything saved is written behind."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
        assert self._process.wait(2 * WAIT_S) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        """End it without a chance to clean up."""
        self._process.kill()
        self._process.wait()

    def close_pipes(self) -> None:
        """After `kill`, where no `close` follows."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self.kill()

    def begin(self, verb: str, *arguments: Any) -> None:
        """Call without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self._process.stdin.flush()

    def _call(self, verb: str, *arguments: Any) -> Any:
        assert self._process.stdout is not None
        self.begin(verb, *arguments)
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise AssertionError(f"the engine process ended ({self._process.wait()}) instead of answering {verb}")


def main() -> None:
    """Answer calls until the input ends."""
    settings = json.loads(sys.argv[1])
    engine = Engine(settings["model"], settings["extra"], settings.get("transfer"), **settings.get("options", {}))
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(ANSWER + json.dumps(getattr(engine, verb)(*arguments)), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
