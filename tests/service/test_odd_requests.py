"""A daemon under requests that are malformed or mislabelled: what it answers, and what it says about them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.service.protocol import frames as protocol
from kvstore.service.protocol.frames import Kind
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import LocalDaemon, attach, local_daemon
from tests.helpers.odd_requests import SECRET, body_of, everything_logged, odd_requests, status_of, talk
from tests.helpers.stores import LAYOUT, PAGE_BYTES, load, namespace, prompt, save

ROUTES = {
    "/v1/lookup": b'{"tokens": [1, 2, 3]}',
    "/v1/namespaces": b"{}",
    "/v1/pages": b"",
    "/v1/dashboard/series": b"",
}


@pytest.fixture(params=["with tokens", "without"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalDaemon]:
    service = {"http_port": 0, "max_namespaces": 32}
    if request.param == "with tokens":
        tokens = tmp_path / "tokens.toml"
        tokens.write_text(f'[[tenant]]\nname = "blue"\ntoken = "{SECRET}"\noperator = true\n')
        tokens.chmod(0o600)
        service["tokens_file"] = tokens  # type: ignore[assignment]
    sections: dict[str, Any] = {
        "service": service,
        "store": {"load_or_recompute": False},
        "host": {"capacity_bytes": 32 * 64 * PAGE_BYTES},  # every namespace has its share
    }
    with local_daemon(tmp_path / "kv.sock", **sections) as daemon:
        yield daemon


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", ROUTES)
def test_no_odd_request_gets_a_5xx_or_reaches_the_log(daemon: LocalDaemon, path: str) -> None:
    method = {"/v1/pages": "PUT", "/v1/dashboard/series": "GET"}.get(path, "POST")
    socket = daemon.config.service.socket
    assert socket is not None
    wrong, answered = {}, 0
    with everything_logged() as said, attach(socket) as store:
        save(store, store.request(prompt(3)))
        for name, data in odd_requests(path, ROUTES[path], method).items():
            for address in (daemon.daemon.app.port, socket):
                answer = talk(address, data)
                status = status_of(answer)
                answered += status > 0
                if status >= 500 or (status >= 400 and not names_a_field(answer)):
                    wrong[name] = answer[:400]
        assert load(store, store.request(prompt(3)))[0] == 3

    assert wrong == {}
    assert answered > len(odd_requests(path, b"")) * 1.6  # of both ways in; some end without an answer
    assert SECRET not in said.getvalue()
    assert "Traceback" not in said.getvalue()


def names_a_field(answer: bytes) -> bool:
    """Whether an error is a problem that says what is wrong with it; those of who may do what have no field."""
    if b"application/problem+json" not in answer:
        return False
    problem = json.loads(body_of(answer))
    return problem["status"] == status_of(answer) and (bool(problem.get("field")) or problem["status"] in (401, 403))


def odd_calls() -> list[object]:
    """Messages that have a secret where something else belongs."""
    return [
        SECRET,
        {SECRET: 1},
        [SECRET],
        [11, [SECRET]],
        [11, {SECRET: SECRET}],
        [23, [1, 0, [SECRET.encode()], 1, 0]],
    ]


def hello(**fields: object) -> bytes:
    """The first frame of a client."""
    right = {"layout": layout_to_json(LAYOUT), "namespace": namespace_to_json(namespace()), "client": "engine"}
    return protocol.encode_frame(Kind.HELLO, protocol.encode_json(right | fields), 1)


@pytest.mark.parametrize("daemon", ["with tokens"], indirect=True)
def test_no_field_of_a_frame_reaches_the_log(daemon: LocalDaemon) -> None:
    layout, own = layout_to_json(LAYOUT), namespace_to_json(namespace())
    frames = [
        hello(client=SECRET),
        hello(client=f"engine {SECRET}"),
        hello(client="x" * 50 + f" {SECRET}"),
        hello(namespace=SECRET),
        hello(layout=SECRET),
        *(hello(namespace=own | {name: SECRET}) for name in own),
        *(hello(namespace=own | {name: [SECRET]}) for name in own),
        *(hello(namespace=own | {name: SECRET * 100}) for name in own),
        *(hello(layout=layout | {name: SECRET}) for name in layout),
        protocol.encode_frame(Kind.HELLO, SECRET.encode(), 1),
        protocol.encode_frame(Kind.ATTACH, protocol.encode_json({"session": SECRET}), 1),
        protocol.encode_frame(Kind.CALL, SECRET.encode(), 1),
        hello() + protocol.encode_frame(Kind.CALL, SECRET.encode(), 2),
        *(hello() + protocol.encode_frame(Kind.CALL, msgspec.msgpack.encode(call), 2) for call in odd_calls()),
        b"VK" + SECRET.encode() * 4,
    ]
    socket = daemon.config.service.socket
    assert socket is not None
    with everything_logged() as said:
        for frame in frames:
            talk(socket, frame, patience_s=0.3)

    assert "is refused" in said.getvalue()
    assert SECRET not in said.getvalue()
    assert SECRET[:12] not in said.getvalue()  # nor a part of it
    assert "Traceback" not in said.getvalue()
