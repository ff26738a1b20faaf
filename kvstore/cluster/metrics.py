"""Counters of replicas and routers, for Prometheus. A registry of their own each, so that tests can have several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.cluster.admission import QUEUE_FULL, TOKEN_BUDGET, Admission
from kvstore.metrics import StoreCollector

if TYPE_CHECKING:
    from kvstore.base import KVStore
    from kvstore.cluster.answer import ReplicaAnswer
    from kvstore.cluster.replicas import ReplicaLink

# A factor of about two from one to the next: a median read off them is right within 40 %.
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
ENGINE = "engine"  # the tier of what an engine had in a cache of its own


class ReplicaMetrics:
    """Of one replica, whatever its engine: dashboards read these names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ttft = self._histogram("ttft_seconds", "From a request's arrival to its first token.", TTFT_BUCKETS_S)
        self.queue = self._histogram("queue_seconds", "From a request's arrival to its first step.", TTFT_BUCKETS_S)
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "Mean time between the tokens of a finished request.", TOKEN_BUCKETS_S
        )
        self.load = self._counter("load_seconds", "Looking up, waiting for pages and copying them.")
        self.compute_wait = self._counter("compute_wait_seconds", "Of load: waiting for a prompt that others compute.")
        self.prefill = self._counter("prefill_seconds", "Computing prompts.")
        self.decode = self._counter("decode_seconds", "Computing tokens after the first one.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that came to a first token.")
        self.new_tokens = self._counter("new_tokens", "Tokens generated.")
        self.unsaved_pages = self._counter(
            "unsaved_pages", "Pages of answers that were not saved because no next turn can begin with them."
        )
        self.hit_tokens = self._counter("hit_tokens", "Prompt tokens that were not computed, by tier.", "tier")
        self.requests = self._counter("requests", "Requests answered, by HTTP status.", "status")
        self.cancelled = self._counter("cancelled", "Requests whose client left before the end.")

    def attach(
        self,
        admission: Admission,
        *,
        num_running: Callable[[], int],
        num_queued: Callable[[], int],
        store: KVStore | None,
    ) -> None:
        """Show an open engine's state, and its store's metrics. store: None if it is not in this process."""
        for name, text, read in (
            ("running_requests", "Requests that are computed.", num_running),
            ("queued_requests", "Requests that wait for their turn.", num_queued),
            ("held_tokens", "Prompt and answer tokens of all that wait or run.", lambda: admission.tokens),
            (
                "prefill_tokens_per_second",
                "Measured rate of computing prompts.",
                lambda: admission.prefill.tokens_per_s,
            ),
            (
                "decode_tokens_per_second",
                "Measured rate of computing tokens, all requests together.",
                lambda: admission.decode.tokens_per_s,
            ),
        ):
            Gauge(f"kvstore_replica_{name}", text, registry=self.registry).set_function(read)
        self.registry.register(_Refusals(admission))
        if store is not None:
            self.registry.register(StoreCollector(store))

    def first_token(self, answer: ReplicaAnswer) -> None:
        """A request has its first token."""
        report = answer.report
        self.ttft.observe(answer.ttft_s)
        self.queue.observe(answer.queue_s)
        self.load.inc(report.load_s)
        self.compute_wait.inc(report.compute_wait_s)
        self.prefill.inc(report.prefill_s)
        self.prompt_tokens.inc(report.prompt_tokens)
        self.new_tokens.inc()
        for tier, num_tokens in report.by_tier.items():
            self.hit_tokens.labels(tier).inc(num_tokens)

    def token(self, seconds: float) -> None:
        """A further token was computed."""
        self.new_tokens.inc()
        self.decode.inc(seconds)

    def finished(self, answer: ReplicaAnswer) -> None:
        """A request came to its end."""
        report = answer.report
        if report.new_tokens > 1:
            self.per_token.observe(report.decode_s / (report.new_tokens - 1))

    def left(self, answer: ReplicaAnswer) -> None:
        """A request is over, well or not."""
        self.unsaved_pages.inc(answer.report.unsaved_pages)

    def render(self) -> bytes:
        """Prometheus' text format. May ask the store: not on the event loop."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvstore_replica_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"kvstore_replica_{name}", text, buckets=buckets, registry=self.registry)


class _Refusals(Collector):
    """The counters of the admission."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        refused = CounterMetricFamily("kvstore_replica_refusals", "Requests refused, by reason.", labels=["reason"])
        for reason in (QUEUE_FULL, TOKEN_BUDGET):
            refused.add_metric([reason], self._admission.refusals[reason])
        yield refused


class RouterMetrics:
    """Of a router."""

    def __init__(self, links: Sequence[ReplicaLink]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kvstore_router_requests",
            "Requests answered, by the replica that did (none: all failed or refused) and HTTP status.",
            ["replica", "status"],
            registry=self.registry,
        )
        self.retries = Counter(
            "kvstore_router_retries",
            "Replicas that were asked and did not answer, by why.",
            ["replica", "reason"],
            registry=self.registry,
        )
        self.broken = Counter(
            "kvstore_router_broken_streams", "Streams that ended with an error event.", registry=self.registry
        )
        self.lookup = Histogram(
            "kvstore_router_lookup_seconds",
            "Asking all replicas what they have of a prompt.",
            buckets=TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "kvstore_router_request_seconds", "Whole requests.", buckets=TTFT_BUCKETS_S, registry=self.registry
        )
        self.registry.register(_Links(links))

    def answered(self, link: ReplicaLink, status: int, seconds: float) -> None:
        """A request has its answer."""
        self.requests.labels(link.name, str(status)).inc()
        self.seconds.observe(seconds)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _Links(Collector):
    """The state of the replicas, under the names they have now."""

    def __init__(self, links: Sequence[ReplicaLink]) -> None:
        self._links = links

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("kvstore_router_replica_ready", "1 if a replica takes requests.", labels=["replica"])
        flying = GaugeMetricFamily("kvstore_router_in_flight_requests", "Requests a replica has.", labels=["replica"])
        different = {link.rendering for link in self._links if link.is_ready and link.rendering}
        renderings = GaugeMetricFamily(
            "kvstore_router_renderings", "Ways in which ready replicas render chats; above 1 they share no pages."
        )
        renderings.add_metric([], len(different))
        for link in self._links:
            ready.add_metric([link.name], float(link.is_ready))
            flying.add_metric([link.name], link.in_flight)
        yield from (ready, flying, renderings)
