from __future__ import annotations

import os
import socket
from pathlib import Path

from kvstore.llamacpp.life import Life, life_of


def test_another_socket_on_the_same_port_is_another_life() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        before = life_of(f"http://127.0.0.1:{port}", None)
        assert before.is_seen
        assert life_of(f"http://localhost:{port}/", None).is_seen
    assert not life_of(f"http://127.0.0.1:{port}", None).is_seen

    with socket.create_server(("127.0.0.1", port)):
        assert life_of(f"http://127.0.0.1:{port}", None) != before


def test_a_file_in_place_of_the_first_is_another_life(tmp_path: Path) -> None:
    model, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    for path in (model, other):
        path.write_bytes(b"GGUF")
        os.utime(path, (1, 1))
    before = life_of("http://127.0.0.1:1", str(model))

    other.rename(model)

    assert before.file
    assert life_of("http://127.0.0.1:1", str(model)) != before


def test_what_cannot_be_seen_is_no_life() -> None:
    for url in ("http://192.0.2.1:80", "http://127.0.0.1:70000", "http://[", "unix://x", "http://host.invalid:80"):
        assert life_of(url, "/nowhere/model.gguf") == Life()
