from __future__ import annotations

import pytest

from connectors.sglang.updates import Updates


class Server:
    """Weights that are updated as SGLang does it: the change, then the new version, then the flush."""

    def __init__(self) -> None:
        self.version = "default"
        self.updates = Updates(lambda: self.version)

    def update(self, version: str | None = None, *, is_flushed: bool = True) -> None:
        self.updates.began()
        self.version = version or self.version
        self.updates.ended(is_flushed=is_flushed)

    @property
    def mark(self) -> bytes | None:
        return self.updates.mark(by_name=True)


@pytest.fixture
def server() -> Server:
    return Server()


def test_before_any_update_there_is_no_mark_whatever_the_version_is_called(server: Server) -> None:
    assert server.mark == b""
    server.version = "v1"
    assert server.mark == b""


def test_an_update_that_names_the_weights_and_flushes_has_a_mark(server: Server) -> None:
    server.update("v1")
    assert server.mark == b"v1"
    server.update("v2")
    assert server.mark == b"v2"
    server.update("v1")
    assert server.mark == b"v1"


def test_names_of_updates_have_to_be_vouched_for(server: Server) -> None:
    server.update("v1")

    assert server.updates.mark(by_name=False) is None


def test_while_weights_change_there_are_no_names(server: Server) -> None:
    server.updates.began()
    assert server.mark is None
    server.version = "v1"
    assert server.mark is None  # caches still hold what the weights before have computed


def test_an_update_without_a_name_or_with_that_of_other_weights_has_no_names(server: Server) -> None:
    server.update()
    assert server.mark is None
    server.update("v1")
    assert server.mark == b"v1"
    server.update("v1")
    assert server.mark is None


def test_an_update_that_flushes_nothing_has_no_names_until_one_that_does(server: Server) -> None:
    server.update("v1", is_flushed=False)
    assert server.mark is None
    server.update("v1")  # the last part of the same weights
    assert server.mark == b"v1"


def test_weights_can_be_named_after_their_update(server: Server) -> None:
    server.update()
    server.version = "v1"

    assert server.mark == b"v1"
