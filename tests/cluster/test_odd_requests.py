"""Replica and router under requests that are malformed or mislabelled: what they answer, and what they log of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from connectors.transformers.runner import ModelSpec
from kvstore.cluster.replica import ReplicaServer, ReplicaSettings
from kvstore.cluster.router import Router, RouterSettings
from kvstore.config.sections import Config
from tests.helpers.odd_requests import SECRET, body_of, everything_logged, odd_requests, status_of, talk
from tests.helpers.replicas import BLOCK, CHUNK, make_model

PATHS = {
    "/v1/completions": b'{"prompt": "Once upon a time", "max_tokens": 2}',
    "/v1/chat/completions": b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}',
    "/v1/lookup": b'{"prompt": "Once upon a time"}',
}


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[ReplicaServer]:
    spec = ModelSpec(str(make_model(tmp_path / "model")), "tiny", "float32", 1, CHUNK, "exact", True)
    config = Config(store={"block_size": BLOCK}, host={"capacity_bytes": "8MiB", "huge_pages": False})
    replica = ReplicaServer(ReplicaSettings("r0", "127.0.0.1", 0, spec, drain_s=1.0), config)
    await replica.site.start()
    await replica.engine.open()
    replica.is_ready = True
    yield replica
    await replica.close()


@pytest.fixture
async def router(replica: ReplicaServer) -> AsyncIterator[Router]:
    router = Router(RouterSettings([replica.site.url], "prefix", "127.0.0.1", 0))
    await router.start()
    yield router
    await router.close()


@pytest.mark.timeout(300)
async def test_no_odd_request_gets_a_5xx_or_reaches_the_log(replica: ReplicaServer, router: Router) -> None:
    wrong, answered = {}, 0
    with everything_logged() as said:
        for server in (replica, router):
            for path, body in PATHS.items():
                for name, data in odd_requests(path, body).items():
                    answer = await asyncio.to_thread(talk, server.site.port, data)
                    answered += status_of(answer) > 0
                    if status_of(answer) >= 500 or (status_of(answer) >= 400 and not is_openai_error(answer)):
                        wrong[type(server).__name__, path, name] = answer[:500]

    assert wrong == {}
    assert answered > 2 * sum(len(odd_requests(path, body)) for path, body in PATHS.items()) * 0.8
    assert SECRET not in said.getvalue()
    assert "Traceback" not in said.getvalue()


def is_openai_error(answer: bytes) -> bool:
    """Whether an error has OpenAI's form and a sentence."""
    error = json.loads(body_of(answer))["error"]
    return bool(error["message"]) and "type" in error
