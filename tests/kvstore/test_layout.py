"""A layout: sizes, rules, and a fingerprint that changes with anything that changes the meaning of a page's bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.layout import (
    MAX_PADDING,
    SLOT_ALIGNMENT,
    GroupKind,
    LayerGroup,
    LayerSpec,
    Layout,
    balanced_groups,
    groups_with_states,
)

FULL = LayerSpec(GroupKind.FULL, token_bytes=256)
SLIDING = LayerSpec(GroupKind.SLIDING, token_bytes=256, window=512)


def a_layout(**changes: object) -> Layout:
    groups = (
        LayerGroup(GroupKind.FULL, (0, 2), page_bytes=8192),
        LayerGroup(GroupKind.SLIDING, (1, 3), page_bytes=6000, window=33),
    )
    return replace(Layout(16, groups, "test:layer,token", "bfloat16"), **changes)  # type: ignore[arg-type]


class TestSizes:
    def test_a_slot_holds_the_largest_group_of_all_shards_in_whole_sectors(self) -> None:
        assert a_layout().slot_bytes == 8192
        assert a_layout(shards=3).slot_bytes == 24_576
        assert a_layout(groups=(LayerGroup(GroupKind.FULL, (0,), 8193),)).slot_bytes == 12_288

    def test_stored_and_block_bytes_count_no_padding(self) -> None:
        layout = a_layout(shards=2)

        assert [layout.stored_bytes(group) for group in (0, 1)] == [16_384, 12_000]
        assert layout.block_bytes == 28_384

    @given(st.integers(1, 1 << 24), st.integers(1, 16))
    def test_every_group_fits_a_slot_with_less_than_a_sector_to_spare(self, page_bytes: int, shards: int) -> None:
        layout = a_layout(groups=(LayerGroup(GroupKind.FULL, (0,), page_bytes),), shards=shards)

        assert layout.slot_bytes % SLOT_ALIGNMENT == 0
        assert 0 <= layout.slot_bytes - layout.stored_bytes(0) < SLOT_ALIGNMENT


class TestWindows:
    def test_full_groups_need_every_block(self) -> None:
        assert a_layout().window_blocks(0) is None

    @pytest.mark.parametrize(("window", "blocks"), [(1, 0), (2, 1), (17, 1), (18, 2), (33, 2), (512, 32)])
    def test_sliding_groups_need_the_blocks_of_the_last_window_minus_one_tokens(self, window: int, blocks: int) -> None:
        layout = a_layout(groups=(LayerGroup(GroupKind.SLIDING, (0,), 4096, window=window),))

        assert layout.window_blocks(0) == blocks


class TestFingerprint:
    def test_it_is_the_same_in_every_process(self) -> None:
        assert a_layout().fingerprint == a_layout().fingerprint == "58e7edcbbc1dad9df69f96d04d4f160e"

    @pytest.mark.parametrize(
        "changes",
        [
            {"block_size": 32},
            {"format": "test:token,layer"},
            {"dtype": "float16"},
            {"shards": 2},
            {"groups": a_layout().groups[:1]},
            {"groups": a_layout().groups[::-1]},
            {"groups": (a_layout().groups[0], replace(a_layout().groups[1], window=34))},
            {"groups": (a_layout().groups[0], replace(a_layout().groups[1], layers=(1, 4)))},
            {"groups": (replace(a_layout().groups[0], page_bytes=8191), a_layout().groups[1])},
            {"groups": (replace(a_layout().groups[0], kind=GroupKind.MLA), a_layout().groups[1])},
        ],
    )
    def test_anything_that_changes_the_bytes_changes_it(self, changes: dict[str, object]) -> None:
        assert a_layout(**changes).fingerprint != a_layout().fingerprint


class TestBadValues:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"block_size": 0}, "block_size is 0"),
            ({"groups": ()}, "no layer group"),
            ({"shards": 0}, "shards is 0"),
        ],
    )
    def test_a_layout_that_cannot_be_says_which_field(self, changes: dict[str, object], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            a_layout(**changes)

    @pytest.mark.parametrize(
        ("kind", "page_bytes", "window", "told"),
        [
            (GroupKind.FULL, 0, None, "page_bytes is 0"),
            (GroupKind.FULL, 8, 5, "window is 5 for a full group"),
            (GroupKind.SLIDING, 8, None, "window is None for a sliding group"),
            (GroupKind.SLIDING, 8, 0, "window is 0 tokens"),
        ],
    )
    def test_a_group_that_cannot_be_says_which_field(
        self, kind: GroupKind, page_bytes: int, window: int | None, told: str
    ) -> None:
        with pytest.raises(ConfigError, match=told):
            LayerGroup(kind, (0,), page_bytes, window)


class TestBalancedGroups:
    def test_a_model_of_one_kind_is_one_group(self) -> None:
        groups = balanced_groups([FULL] * 30, block_size=16)

        assert groups == (LayerGroup(GroupKind.FULL, tuple(range(30)), 30 * 16 * 256),)

    def test_a_mixed_model_is_cut_into_groups_of_equal_size(self) -> None:
        layers = [
            FULL if index % 6 == 5 else SLIDING for index in range(18)
        ]  # 15 sliding and 3 full, as in Gemma 3 270M

        groups = balanced_groups(layers, block_size=16)

        assert [group.kind for group in groups].count(GroupKind.SLIDING) == 5
        assert {len(group.layers) for group in groups} == {3}
        assert {group.page_bytes for group in groups} == {3 * 16 * 256}

    def test_layers_without_kv_are_left_out(self) -> None:
        groups = balanced_groups([None, FULL, None, FULL], block_size=16)

        assert [group.layers for group in groups] == [(1, 3)]

    def test_a_model_without_kv_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no layer that keeps keys and values"):
            balanced_groups([None, None], block_size=16)

    @given(st.lists(st.sampled_from([None, FULL, SLIDING, LayerSpec(GroupKind.MLA, 100)]), min_size=1, max_size=40))
    def test_every_layer_is_in_exactly_one_group_of_its_own_kind(self, layers: list[LayerSpec | None]) -> None:
        if not any(layers):
            return

        groups = balanced_groups(layers, block_size=4)

        placed = [layer for group in groups for layer in group.layers]
        assert sorted(placed) == [index for index, spec in enumerate(layers) if spec is not None]
        for group in groups:
            specs = {layers[layer] for layer in group.layers}
            assert len(specs) == 1
            (spec,) = specs
            assert spec is not None
            assert (group.kind, group.window) == (spec.kind, spec.window)
            assert group.page_bytes == spec.token_bytes * len(group.layers) * 4


class TestStates:
    @pytest.mark.parametrize(
        ("name", "spec", "num_attention", "state_bytes"),
        [
            ("Qwen3-Next 80B", LayerSpec(GroupKind.FULL, 2048), 12, 36 * (8192 * 4 * 2 + 32 * 128 * 128 * 4)),
            ("Qwen3.5 4B", LayerSpec(GroupKind.FULL, 4096), 8, 24 * (8192 * 4 * 2 + 32 * 128 * 128 * 4)),
            ("Kimi-Linear 48B", LayerSpec(GroupKind.MLA, 1152), 7, 20 * (3 * 4096 * 4 * 2 + 32 * 128 * 128 * 4)),
            ("Granite 4.0 tiny", LayerSpec(GroupKind.FULL, 2048), 4, 36 * (3328 * 4 * 2 + 48 * 64 * 128 * 4)),
            ("Granite 4.0 small", LayerSpec(GroupKind.FULL, 4096), 4, 36 * (8448 * 4 * 2 + 128 * 64 * 128 * 4)),
            ("Falcon-H1 0.5B", LayerSpec(GroupKind.FULL, 512), 36, 36 * (1792 * 4 * 2 + 24 * 64 * 128 * 4)),
            ("Nemotron-H 8B", LayerSpec(GroupKind.FULL, 4096), 4, 24 * (10240 * 4 * 2 + 128 * 64 * 128 * 4)),
            ("Bamba 9B", LayerSpec(GroupKind.FULL, 4096), 3, 29 * (8448 * 4 * 2 + 128 * 64 * 128 * 4)),
            ("Jamba mini", LayerSpec(GroupKind.FULL, 4096), 4, 28 * (8192 * 4 * 2 + 8192 * 16 * 4)),
            ("Mamba-2 2.7B", None, 0, 64 * (5376 * 4 * 2 + 80 * 64 * 128 * 4)),
            ("LFM2 1.2B", LayerSpec(GroupKind.FULL, 2048), 6, 10 * 2048 * 3 * 2),
        ],
    )
    def test_a_state_leaves_at_most_an_eighth_of_its_slots_empty(
        self, name: str, spec: LayerSpec | None, num_attention: int, state_bytes: int
    ) -> None:
        groups = groups_with_states([spec] * num_attention, 64, range(100, 110), state_bytes)
        layout = Layout(64, groups, name, "bfloat16")

        num_slots = len(groups) - layout.block_groups
        assert layout.state_bytes == state_bytes
        assert all(group.page_bytes % 64 == 0 for group in groups[layout.block_groups : -1])
        assert 1 - state_bytes / (num_slots * layout.slot_bytes) <= MAX_PADDING
        assert len(groups) <= 256  # what a daemon takes
        pages = layout.block_groups * layout.slot_bytes
        assert pages - layout.block_bytes <= 0.12 * pages

    def test_a_state_is_needed_of_the_last_block_only_and_is_no_part_of_a_block(self) -> None:
        groups = groups_with_states([FULL, None], 16, [1], 9000)
        layout = Layout(16, groups, "test", "uint8")

        assert [(group.kind.value, group.page_bytes) for group in groups] == [
            ("full", 4096),
            ("recurrent", 3008),
            ("recurrent", 3008),
            ("recurrent", 2984),
        ]
        assert [layout.window_blocks(group) for group in range(4)] == [None, 1, 1, 1]
        assert (layout.block_groups, layout.block_bytes, layout.state_bytes) == (1, 4096, 9000)

    def test_pieces_of_states_come_last(self) -> None:
        state, page = LayerGroup(GroupKind.RECURRENT, (1,), 4096), LayerGroup(GroupKind.FULL, (0,), 4096)

        with pytest.raises(ConfigError, match="come last"):
            a_layout(groups=(state, page))
