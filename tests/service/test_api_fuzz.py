"""The API against its own OpenAPI document: schemathesis makes requests, right and wrong, and judges the answers."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.stores import PAGE_BYTES, load, prompt, save

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 12  # per operation
# Streams: what they answer is no JSON, and the one of events does not end.
STREAMS = ("/v1/events", "/v1/pages", "/v1/pages/read")


@pytest.mark.timeout(300)
def test_every_operation_answers_as_its_document_says_and_the_daemon_serves_as_before(tmp_path: Path) -> None:
    sections = {"service": {"http_port": 0}, "store": {"load_or_recompute": False}}
    with local_daemon(tmp_path / "kv.sock", tmp_path / "disk", **sections) as daemon:
        with attach(tmp_path / "kv.sock") as store:
            save(store, store.request(prompt(3)))
            tried = fuzz(daemon)
            assert sum(tried.values()) > 100
            assert daemon.daemon.app.num_refused > 0

        http = Http(daemon.daemon.app.port)
        http.call("POST", "/v1/tiers/host/resize", {"capacity_bytes": 64 * PAGE_BYTES})
        with attach(tmp_path / "kv.sock") as store:
            save(store, store.request(prompt(5, 9)))
            assert load(store, store.request(prompt(5, 9)))[0] == 5
        daemon.look(lambda d: [opened.store.check() for opened in d.stores.all()])


def fuzz(daemon: LocalDaemon) -> dict[str, int]:
    """Try every operation but the streams; returns how often each was called."""
    base = f"http://127.0.0.1:{daemon.daemon.app.port}"
    document = schemathesis.openapi.from_url(f"{base}/v1/openapi.json")
    tried: dict[str, int] = {}
    for result in document.get_all_operations():
        operation = result.ok()
        if operation.path in STREAMS:
            continue

        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=cases(operation))
        def call(case: Any) -> None:
            tried[case.operation.label] = tried.get(case.operation.label, 0) + 1
            case.call_and_validate(base_url=base, timeout=20)

        call()
    return tried


def cases(operation: Any) -> Any:
    """Requests of an operation, right and wrong ones."""
    modes = schemathesis.GenerationMode
    if not (operation.body or operation.query or operation.path_parameters):
        return operation.as_strategy(generation_mode=modes.POSITIVE)
    return operation.as_strategy(generation_mode=modes.POSITIVE) | operation.as_strategy(generation_mode=modes.NEGATIVE)
