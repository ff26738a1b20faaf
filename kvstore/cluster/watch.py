"""Follows the requests of a server, beside them: where each session's next prompt leaves the one before.

On only where it is asked for. A request's body is handed over and its handler goes on; one thread renders and compares.
While too many wait, further ones are counted and not looked at. The last prompt of each session is kept, within bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore import logs
from kvstore.errors import ConfigError, KVStoreError, RequestError
from kvstore.prefix.rendering import Limits, RenderProcess
from kvstore.prefix.requests import parse
from kvstore.prefix.template import ModelTemplate, load, plain
from kvstore.prefix.traffic import Traffic

log = logs.limited(__name__)

PLAIN = "plain"
MAX_WAITING = 64
MAX_WAITING_BYTES = 64 << 20
RENDER_S = 2.0  # as long as a real template never takes


class PrefixWatch:
    """A server's watch. `saw` and `close` are for its event loop; the rest happens in the one thread.

    source: a model, a directory or a template, as `kvstore prefix` takes it; PLAIN puts messages one after another.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, "prefix-watch")
        self._process = RenderProcess(Limits(seconds=RENDER_S))
        self._traffic: Traffic | None = None
        self._waiting = self._waiting_bytes = 0
        self._finished = 0
        self._finished_bytes = 0
        self.unwatched = 0
        self.report: dict[str, Any] = {}

    def saw(self, body: bytes) -> None:
        """Take a request's body. Returns at once."""
        waiting, waiting_bytes = self._waiting - self._finished, self._waiting_bytes - self._finished_bytes
        if waiting >= MAX_WAITING or waiting_bytes + len(body) > MAX_WAITING_BYTES:
            self.unwatched += 1
            return
        self._waiting += 1
        self._waiting_bytes += len(body)
        self._thread.submit(self._look, body)

    def as_json(self) -> dict[str, Any]:
        """The sums so far: of `GET /v1/prefix`."""
        return {**self.report, "unwatched_requests": self.unwatched}

    def close(self) -> None:
        """End the thread, when what it is doing is done, and the process that renders. Waits; idempotent."""
        self._thread.shutdown(cancel_futures=True)
        self._process.close()

    def _look(self, body: bytes) -> None:
        try:
            if self._traffic is None:
                self._traffic = Traffic(_find(self._source), self._process)
            self._traffic.observe(parse(json.loads(body)))
            self.report = self._traffic.report()  # a new one each time: who reads it sees one state
        except (RequestError, ValueError, RecursionError):
            self.unwatched += 1  # its handler has told the client
        except Exception as error:
            self.unwatched += 1
            log.error("a request could not be watched: %s", logs.where(error))
        finally:
            self._finished += 1
            self._finished_bytes += len(body)


class WatchCollector(Collector):
    """The watch's sums, for Prometheus. prefix: "kvstore_replica" or "kvstore_router"."""

    def __init__(self, watch: PrefixWatch, prefix: str) -> None:
        self._watch = watch
        self._prefix = prefix

    def register(self, registry: CollectorRegistry) -> None:
        """Show them in a registry."""
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the counters."""
        told = self._watch.as_json()
        labels = ["shape", "mechanism"]
        turns = CounterMetricFamily(
            f"{self._prefix}_prefix_turns", "Prompts that follow another of their session.", labels=labels
        )
        lost = CounterMetricFamily(
            f"{self._prefix}_prefix_lost_tokens", "Tokens of the prompt before that they left.", labels=labels
        )
        for group in told.get("groups", ()):
            turns.add_metric([group["shape"], group["mechanism"]], group["turns"])
            lost.add_metric([group["shape"], group["mechanism"]], group["lost_tokens"])
        yield from (turns, lost)
        for name, key, text in (
            ("repeated_elsewhere_tokens", "repeated_elsewhere_tokens", "Repeated tokens that no prefix cache reaches."),
            ("unwatched_requests", "unwatched_requests", "Requests that were not compared."),
        ):
            yield CounterMetricFamily(f"{self._prefix}_prefix_{name}", text, value=told.get(key, 0))


def _find(source: str) -> ModelTemplate:
    if source == PLAIN:
        return plain()
    try:
        return load(source)
    except (ConfigError, KVStoreError) as error:
        log.warning("watching prefixes without the model's template: %s", error)
        return plain()
