from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.sglang_linker.paths import TreePaths, check_callers
from kvstore.errors import ConfigError


class Wrapper:
    """Calls as SGLang's does."""

    def __init__(self, own: list[str]) -> None:
        self.cache = SimpleNamespace(
            page_size=4,
            get_prefix_hash_values=lambda node: [f"before {node}"],
            tree_core=SimpleNamespace(get_hash_values=lambda node: own),
        )
        self.paths: Any = None
        self.told: Any = None

    def match(self, device_hit_len: int) -> None:
        result = SimpleNamespace(last_device_node=7)
        self.told = self.paths.before_lookup()
        assert result

    def _offload_node(self, node_id: int) -> None:
        self.told = self.paths.before_offload()

    def offload_nodes(self, node_id: int) -> None:
        self._offload_node(node_id)


@pytest.fixture
def wrapper() -> Wrapper:
    made = Wrapper(["own a", "own b"])
    made.paths = TreePaths(Wrapper)
    return made


def test_a_lookup_continues_what_the_pool_has(wrapper: Wrapper) -> None:
    wrapper.match(12)

    assert wrapper.told == ["before 7", "own a", "own b"]


def test_a_lookup_without_a_hit_in_the_pool_begins_at_the_root(wrapper: Wrapper) -> None:
    wrapper.match(0)

    assert wrapper.told == []


def test_a_path_that_is_not_as_long_as_the_hit_is_not_believed(wrapper: Wrapper) -> None:
    wrapper.match(16)

    assert wrapper.told is None


def test_a_node_continues_its_ancestors(wrapper: Wrapper) -> None:
    wrapper.offload_nodes(9)

    assert wrapper.told == ["before 9"]


def test_a_call_from_elsewhere_has_no_path(wrapper: Wrapper) -> None:
    assert wrapper.paths.before_lookup() is None
    assert wrapper.paths.before_offload() is None


def test_a_wrapper_that_keeps_the_node_elsewhere_is_refused() -> None:
    class Other:
        def match(self, device_hit_len: int) -> int:
            result = device_hit_len
            return result

        def _offload_node(self, node: int) -> None: ...

    with pytest.raises(ConfigError, match="_offload_node has no node_id"):
        check_callers(Other)
