"""One replica of the demo: a model, a tokenizer and a store in a process of its own.

    python -m kvstore.demo.replica

It reads one JSON object per line on standard input: first a `ReplicaSpec`, then commands. It writes JSON lines on
standard output: any number of {"event": "piece"}, then one {"event": "done"} or {"event": "error"} per line it read.
Whatever a library prints goes to standard error. It ends at the end of its input.

    {"do": "prompts", "prompt_tokens": n}           the demo's system prompts, cut to length by this model's tokenizer
    {"do": "ask", "messages": [...], "use_store": true, "max_new_tokens": n}
    {"do": "flush"}                                 wait until all that was saved is on every tier
    {"do": "explain", "messages": [...]}            measure what a KV cache is worth here

The hard thing: replicas must compute the same bits, so all of them are given the same number of threads; and each warms
up on a prompt of its own before it is ready, since the first forwards of a process are slower than all later ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from connectors.transformers.loading import chat_ids
from connectors.transformers.runner import WARM_UP_TAIL, ModelSpec, Runner
from kvstore.config.sections import Config
from kvstore.errors import KVStoreError

Emit = Callable[[dict[str, Any]], None]
Messages = Sequence[Mapping[str, str]]

HOST_BYTES = 1 << 30
DISK_BYTES = 2 << 30
REDIS_TTL_S = 3600.0  # a server that outlives the demo forgets it soon
FLUSH_TIMEOUT_S = 60.0
# Longer than a server's: a demo on a loaded laptop should show what the tiers hold, not how short a deadline can be.
LOOKUP_DEADLINE_S = 2.0
LOAD_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """The settings of a replica.

    source:         directory or hub id of the model.
    dtype:          "float32", "bfloat16" or "float16".
    threads:        of torch; equal in all replicas.
    prefill_chunk:  tokens per forward of a prompt.
    disk_path:      directory of the disk tier; None turns it off.
    redis_url:      None turns Redis off. May hold a password, so a spec never goes on a command line.
    redis_prefix:   of all keys on that server.
    """

    source: str
    dtype: str
    threads: int
    prefill_chunk: int
    disk_path: str | None = None
    redis_url: str | None = None
    redis_prefix: str = "kv:"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ReplicaSpec:
        """Read `to_json`."""
        return cls(**json.loads(text))


class DemoReplica:
    """The model with a store, and the same model without, for reference."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        config = Config(
            store={"lookup_deadline_s": LOOKUP_DEADLINE_S, "load_deadline_s": LOAD_DEADLINE_S},
            host={"capacity_bytes": HOST_BYTES},
            disk={"path": spec.disk_path, "capacity_bytes": DISK_BYTES},
            redis={"url": spec.redis_url, "prefix": spec.redis_prefix, "ttl_s": REDIS_TTL_S},
        )
        model = ModelSpec(
            spec.source, dtype=spec.dtype, threads=spec.threads, prefill_chunk=spec.prefill_chunk, single_flight=False
        )
        self._runner = Runner(model, config)
        self.tokenizer = self._runner.tokenizer

    def warm_up(self) -> None:
        """Compute a prompt that no stage uses. The store is not told the rate: the demo shows what the tiers hold."""
        self._runner.compute_unasked(WARM_UP_TAIL)

    def ask(self, messages: Messages, max_new_tokens: int, use_store: bool, emit: Emit) -> dict[str, Any]:
        """Answer greedily; the record has the fields of `demo_report.Answer`."""
        engine = self._runner.with_store if use_store else self._runner.without_store
        ids = chat_ids(self.tokenizer, messages)
        done = engine.generate(ids, max_new_tokens, on_piece=lambda piece: emit({"event": "piece", "text": piece.text}))
        report = done.report
        return {
            "prompt_tokens": report.prompt_tokens,
            "reused": report.by_tier,
            "ttft_s": report.ttft_s,
            "cpu_s": report.cpu_s,
            "tokens": done.tokens,
            "text": done.text,
        }

    def flush(self) -> dict[str, Any]:
        """Wait until what was saved is on every tier."""
        saved = self._runner.with_store.flush(FLUSH_TIMEOUT_S) and self._runner.store.flush(FLUSH_TIMEOUT_S)
        return {"flushed": bool(saved)}

    def prompts(self, prompt_tokens: int) -> dict[str, Any]:
        """The demo's two system prompts, of about `prompt_tokens` tokens."""
        from kvstore.demo.text import forked_handbook, handbook

        def count(text: str) -> int:
            return len(self.tokenizer.encode(text))

        return {"handbook": handbook(prompt_tokens, count), "forked": forked_handbook(prompt_tokens, count)}

    def explain(self, messages: Messages) -> dict[str, Any]:
        """Measure decode steps with and without KV cache, and the rates of prefill and decode."""
        from kvstore.demo.explain import measure

        return measure(self._runner.model, chat_ids(self.tokenizer, messages), self._spec.prefill_chunk)

    def close(self) -> None:
        """Write behind what is left, and close."""
        self._runner.close(FLUSH_TIMEOUT_S)


def serve(spec: ReplicaSpec, lines: Sequence[str] | Any, emit: Emit) -> None:
    """Answer commands until `lines` ends."""
    replica = DemoReplica(spec)
    try:
        replica.warm_up()
        emit({"event": "done"})
        for line in lines:
            command = json.loads(line)
            try:
                emit({"event": "done", **_obey(replica, command, emit)})
            except KVStoreError as error:
                emit({"event": "error", "message": str(error)})
    finally:
        replica.close()


def _obey(replica: DemoReplica, command: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    match command["do"]:
        case "ask":
            return replica.ask(command["messages"], command["max_new_tokens"], command["use_store"], emit)
        case "flush":
            return replica.flush()
        case "prompts":
            return replica.prompts(command["prompt_tokens"])
        case "explain":
            return replica.explain(command["messages"])
        case other:
            raise KVStoreError(f"replica: unknown command {other!r}")


def main() -> None:
    """Run as a child process; see the module's text."""
    # Libraries print to standard output as they like; the protocol keeps the real one for itself.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(record: dict[str, Any]) -> None:
        out.write(json.dumps(record) + "\n")
        out.flush()

    try:
        serve(ReplicaSpec.from_json(sys.stdin.readline()), sys.stdin, emit)
    except (KVStoreError, OSError, ValueError) as error:
        # A model that cannot be loaded, a directory that cannot be written: an answer, not an accident.
        emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
