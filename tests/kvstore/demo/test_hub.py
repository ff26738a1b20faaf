from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvstore.demo.hub import ModelUnavailable, check_hub_model

constants = pytest.importorskip("huggingface_hub.constants")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one model that is there, one that is gated, and any other."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/there"):
            self._answer(200, b'{"id": "owner/there", "siblings": []}', {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/owner/gated"):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()
        thread.join()


def test_a_model_that_is_there_is_taken(hub: None) -> None:
    check_hub_model("owner/there")


@pytest.mark.parametrize("name", ["owner/nothing", "nothing"])
def test_a_model_that_is_not_there_is_told_at_once(hub: None, name: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"the hub has no model '{name}'.*give a directory"):
        check_hub_model(name)


@pytest.mark.parametrize("name", ["./none", "../none", "-none", "a..b", "x" * 97])
def test_what_can_be_no_name_at_the_hub_is_told_without_asking(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"there is no directory .* give a directory"):
        check_hub_model(name)


def test_a_gated_model_is_told_with_what_to_do(hub: None) -> None:
    with pytest.raises(ModelUnavailable, match="gated; accept its terms at the hub and set HF_TOKEN"):
        check_hub_model("owner/gated")


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    with pytest.raises(ModelUnavailable, match="is not in the cache, and the hub cannot be asked"):
        check_hub_model("owner/there")


def test_offline_only_the_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE is set"):
        check_hub_model("owner/there")
