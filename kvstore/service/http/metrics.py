"""Prometheus metrics of a daemon: those of its stores, by tenant and namespace, and its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.metrics import StoreCollector
from kvstore.service.daemon.stores import OpenStore


class DaemonCollector(Collector):
    """The families of many stores, merged by name, with the labels `tenant` and `namespace` on every sample."""

    def __init__(self, opened: Iterable[OpenStore], own: dict[str, float]) -> None:
        self._opened = list(opened)
        self._own = own

    def collect(self) -> Iterator[Metric]:
        """Every metric once."""
        merged: dict[str, Metric] = {}
        for one in self._opened:
            labels = {"tenant": one.tenant.name, "namespace": one.id}
            for family in StoreCollector(one.store).collect():
                known = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    known.add_sample(sample.name, {**labels, **sample.labels}, sample.value)
        yield from merged.values()
        for name, value in self._own.items():
            kind: Any = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name, OWN[name], value=value)


OWN = {
    "kvstore_service_clients": "Clients that are attached.",
    "kvstore_service_connections": "Connections of attached clients.",
    "kvstore_service_client_leases": "Leases that clients hold.",
    "kvstore_service_overdue_leases": "Leases that clients have held for longer than service.lease_max_s.",
    "kvstore_service_overdue_slots": "Host slots in overdue leases: out of use until their holder ends.",
    "kvstore_service_clients_total": "Clients that ever attached.",
    "kvstore_service_leases_reclaimed_total": "Leases released because their client was gone.",
    "kvstore_service_leases_expired_total": "Leases of transfers over HTTP released because they were overdue.",
    "kvstore_service_http_requests_total": "HTTP requests answered.",
    "kvstore_service_http_refused_total": "HTTP requests answered with a problem.",
    "kvstore_service_http_connections": "HTTP connections over TCP.",
    "kvstore_service_connections_dropped_total": "Silent connections that had to make room for others.",
    "kvstore_service_connections_refused_total": "Connections that found no room.",
    "kvstore_service_page_transfers": "Transfers of pages over plain HTTP that are under way.",
    "kvstore_service_event_streams": "Event streams that are open.",
    "kvstore_service_open_files": "File descriptors of the daemon.",
}


def render(opened: Iterable[OpenStore], own: dict[str, float]) -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DaemonCollector(opened, own))
    return generate_latest(registry)


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
