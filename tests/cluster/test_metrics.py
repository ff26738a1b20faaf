from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry

from kvstore.cluster.admission import Admission
from kvstore.cluster.engine import Engine
from kvstore.cluster.metrics import ReplicaMetrics, RouterMetrics
from kvstore.cluster.runner import ModelSpec
from kvstore.config.sections import Config

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


class EngineWithoutStore(Engine):
    has_own_store = False  # type: ignore[assignment]


def rows(registry: CollectorRegistry) -> list[str]:
    """The lines of docs/metrics.md."""
    families = sorted(cast("Any", registry.collect()), key=lambda family: family.name)
    return [
        f"| `{one.name}{'_total' if one.type == 'counter' else ''}` | {one.type} | {one.documentation} |"
        for one in families
    ]


async def test_the_page_has_every_metric_of_a_replica_and_a_router() -> None:
    metrics = ReplicaMetrics()
    engine = EngineWithoutStore(ModelSpec("", ""), Config(), Admission(1, 1), 1)
    metrics.attach(engine)
    await engine.close(0.0)

    expected = rows(metrics.registry) + rows(RouterMetrics([]).registry)

    assert "\n".join(expected) in PAGE.read_text(), "\n".join(expected)
