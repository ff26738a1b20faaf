from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry

from kvstore.cluster.admission import Admission
from kvstore.cluster.metrics import ReplicaMetrics, RouterMetrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def rows(registry: CollectorRegistry) -> list[str]:
    """The lines of docs/metrics.md."""
    families = sorted(cast("Any", registry.collect()), key=lambda family: family.name)
    return [
        f"| `{one.name}{'_total' if one.type == 'counter' else ''}` | {one.type} | {one.documentation} |"
        for one in families
    ]


def test_the_page_has_every_metric_of_a_replica_and_a_router() -> None:
    metrics = ReplicaMetrics()
    metrics.attach(Admission(1, 1), num_running=lambda: 0, num_queued=lambda: 0, store=None)

    expected = rows(metrics.registry) + rows(RouterMetrics([]).registry)

    assert "\n".join(expected) in PAGE.read_text(), "\n".join(expected)
