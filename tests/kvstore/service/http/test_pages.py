"""The one way to pages for other languages, as docs/service.md shows it."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client.connect import connect
from kvstore.service.http import pages
from kvstore.service.protocol.namespaces import layout_to_json, namespace_to_json
from tests.helpers.daemons import Http, attach, local_daemon
from tests.helpers.stores import BLOCK, LAYOUT, load, namespace, prompt, save
from tests.helpers.waiting import WAIT_S

DOCS = Path(__file__).resolve().parents[4] / "docs" / "service.md"


def test_the_example_of_the_documentation_copies_a_prompt_from_daemon_to_daemon(tmp_path: Path) -> None:
    example = re.search(r"^## Pages for other languages\n.*?^```python\n(.*?)^```$", DOCS.read_text(), re.M | re.S)
    assert example is not None
    with (
        local_daemon(tmp_path / "here.sock", service={"http_port": 0}) as here,
        local_daemon(tmp_path / "there.sock", service={"http_port": 0}) as there,
        attach(tmp_path / "here.sock") as store,
    ):
        ports = [daemon.daemon.app.port for daemon in (here, there)]
        Http(ports[1]).post("/v1/namespaces", layout=layout_to_json(LAYOUT), namespace=namespace_to_json(namespace()))
        save(store, store.request(prompt(3)))
        given = f"tokens = {prompt(3).tolist()}\nhere, there = [f'http://127.0.0.1:{{port}}' for port in {ports}]\n"

        done = subprocess.run(
            [sys.executable, "-I", "-c", given + example[1]], capture_output=True, text=True, timeout=WAIT_S
        )

        assert done.stdout == '{"blocks":3}\n', done.stderr
        with attach(tmp_path / "there.sock") as other:
            assert load(other, other.request(prompt(3)))[0] == 3


PIECE = LayerGroup(GroupKind.RECURRENT, (1,), LAYOUT.groups[0].page_bytes)
LAST = LayerGroup(GroupKind.RECURRENT, (1,), LAYOUT.groups[0].page_bytes - 64)
PAIRS = Layout(BLOCK, (*LAYOUT.groups, PIECE, LAST), "test:pairs", "uint8")
STATES = Layout(BLOCK, (PIECE, LAST), "test:states", "uint8")
TOKENS = [*prompt(4).tolist(), 7]  # the last token is always computed


@pytest.mark.parametrize("layout", [PAIRS, STATES])
def test_pages_and_states_are_copied_from_daemon_to_daemon_in_any_order(layout: Layout, tmp_path: Path) -> None:
    here, there = tmp_path / "here.sock", tmp_path / "there.sock"
    with (
        local_daemon(here, service={"http_port": 0}) as source,
        connect(f"unix://{here}", layout, namespace(layout)) as store,
    ):
        request = store.request(prompt(4))
        lease = store.prepare_save(request, 0, 4, states=[1, 3])
        for page in lease.pages:
            store.slots.array(page.slot)[:] = 10 * page.block + page.group
        store.complete(lease)
        raw = read(Http(source.daemon.app.port), layout)
    frames = split(raw)
    first = layout.block_groups
    orders: list[Callable[[tuple[int, int, bytes]], int]] = [
        lambda _: 0,
        lambda frame: -frame[0],
        lambda frame: -frame[1],
    ]

    assert [frame[:2] for frame in frames][-2:] == [(3, first), (3, first + 1)]
    for order in orders:
        with local_daemon(there, service={"http_port": 0}) as target:
            http = Http(target.daemon.app.port)
            assert put(http, layout, [frame for _, _, frame in sorted(frames, key=order)]) == (4 if first else 1)
            assert read(http, layout) == raw


@pytest.mark.parametrize(("missing", "pages_left"), [((3, 0), 5), ((3, 2), 4)])
def test_of_a_body_without_a_page_or_a_piece_the_rest_is_kept_and_is_whole_with_it(
    missing: tuple[int, int], pages_left: int, tmp_path: Path
) -> None:
    sizes = [PAIRS.stored_bytes(group) for group in range(3)]
    names = [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]  # a state before the page of its block
    frames = {(block, group): framed(block, group, bytes([group]) * sizes[group]) for block, group in names}
    with local_daemon(tmp_path / "d.sock", service={"http_port": 0}) as daemon:
        http = Http(daemon.daemon.app.port)
        put(http, PAIRS, [frame for name, frame in frames.items() if name != missing])
        stats = http.get("/v1/stats")["namespaces"].popitem()[1]
        assert (stats["slots"]["resident"], stats["leases"], split(read(http, PAIRS))) == (pages_left, 0, [])

        put(http, PAIRS, [frames[name] for name in [missing, (3, 1), (3, 2)]])

        assert len(split(read(http, PAIRS))) == 6


def framed(block: int, group: int, data: bytes) -> bytes:
    return pages.FRAME.pack(block, group, 0, len(data), 0, xxhash.xxh3_64_intdigest(data)) + data


def split(raw: bytes) -> list[tuple[int, int, bytes]]:
    """Block, group and the frame itself, of all frames."""
    found = []
    while raw:
        block, group, _, size, _, _ = pages.FRAME.unpack_from(raw)
        end = pages.FRAME.size + size
        found.append((block, group, raw[:end]))
        raw = raw[end:]
    return found


def opened(http: Http, layout: Layout) -> str:
    names = namespace_to_json(namespace(layout))
    told: str = http.post("/v1/namespaces", layout=layout_to_json(layout), namespace=names)["id"]
    return told


def put(http: Http, layout: Layout, frames: list[bytes]) -> int:
    head = json.dumps({"tokens": TOKENS, "namespace": opened(http, layout)}).encode()
    body = struct.pack("<I", len(head)) + head + b"".join(frames)
    status, answer = http.call("PUT", "/v1/pages", body, headers={"Content-Type": pages.CONTENT_TYPE})
    assert status == 200, answer
    return int(answer["blocks"])


def read(http: Http, layout: Layout) -> bytes:
    fields = {"tokens": TOKENS, "namespace": opened(http, layout), "timeout_s": 10.0}
    status, raw = http.call("POST", "/v1/pages/read", fields)
    assert status == 200, raw
    return bytes(raw)
