"""The catalog: which blocks are known, and when they are forgotten."""

from __future__ import annotations

import pytest

from kvstore.plan.catalog import Catalog
from kvstore.plan.state import Block, PageState
from radix.hashing import BlockHash
from tests.helpers.planners import path


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(num_groups=1)


def known(catalog: Catalog, keys: list[BlockHash]) -> list[Block]:
    """The blocks of a path, all of which have a page in host memory."""
    blocks = catalog.insert(keys)
    for block in blocks:
        block.pages[0].state = PageState.READY
    return blocks


def lose(catalog: Catalog, block: Block) -> None:
    """The last copy of a block leaves."""
    block.pages[0].state = PageState.ABSENT
    catalog.prune(block)


def test_a_block_of_which_nothing_is_left_is_forgotten(catalog: Catalog) -> None:
    told: list[Block] = []
    catalog.on_prune = told.append
    keys = path(0, 3).keys
    blocks = known(catalog, keys)

    lose(catalog, blocks[2])

    assert catalog.match(keys) == blocks[:2]
    assert blocks[2].is_removed
    assert told == [blocks[2]]


def test_a_block_that_others_continue_stays_as_a_hole_and_goes_with_them(catalog: Catalog) -> None:
    keys = path(0, 3).keys
    blocks = known(catalog, keys)

    lose(catalog, blocks[1])
    assert catalog.match(keys) == blocks

    lose(catalog, blocks[2])
    assert catalog.match(keys) == blocks[:1]


def test_a_block_is_remembered_for_the_tiers_that_count_and_for_no_other(catalog: Catalog) -> None:
    catalog.homes_that_count = 0b01
    one, other = (known(catalog, path(seed, 1).keys)[0] for seed in (0, 1))
    one.pages[0].homes, other.pages[0].homes = 0b01, 0b10

    lose(catalog, one)
    lose(catalog, other)

    assert (one.is_removed, other.is_removed) == (False, True)


def test_loads_of_a_block_that_is_forgotten_count_for_the_one_before_it(catalog: Catalog) -> None:
    blocks = known(catalog, path(0, 2).keys)
    blocks[0].num_loads, blocks[0].loaded_at = 1, 5.0
    blocks[1].num_loads, blocks[1].loaded_at = 2, 9.0

    lose(catalog, blocks[1])

    assert (blocks[0].num_loads, blocks[0].loaded_at) == (3, 9.0)


def test_a_block_found_before_its_parent_waits_until_its_path_is_known(catalog: Catalog) -> None:
    keys = path(0, 3).keys
    stray = catalog.attach(keys[2], keys[1], depth=2)
    assert catalog.match(keys) == []
    assert catalog.get(keys[2]) is stray

    blocks = catalog.insert(keys)

    assert blocks[2] is stray
    assert stray.parent is blocks[1]
    assert not catalog.strays


def test_a_path_that_is_made_known_in_steps_is_the_one_made_known_at_once(catalog: Catalog) -> None:
    keys = path(0, 7).keys
    known(catalog, [*keys[:3], *path(1, 2).keys])  # branches off

    above: Block | None = None
    blocks: list[Block] = []
    for end in (2, 5, 7):
        blocks += catalog.insert_from(keys, above, end)
        above = blocks[-1]

    assert [block.key for block in blocks] == keys
    assert [block.depth for block in blocks] == list(range(7))
    assert catalog.insert(keys) == blocks
    catalog.tree.check()


def test_what_continues_a_block_is_forgotten_with_it_deepest_first(catalog: Catalog) -> None:
    keys, branch = path(0, 4).keys, path(1, 2).keys
    known(catalog, keys)
    known(catalog, [*keys[:2], *branch])

    parts = []
    while part := catalog.trim(keys[1], 2):
        parts.append(part)

    assert [len(part) for part in parts] == [2, 2, 1]
    removed = [block for part in parts for block in part]
    assert {block.key for block in removed} == {*keys[1:], *branch}
    assert removed[-1].key == keys[1]
    assert all(block.is_removed for block in removed)
    assert [block.key for block in catalog.match(keys)] == keys[:1]


def test_every_page_is_found_strays_included() -> None:
    catalog = Catalog(num_groups=2)
    keys = path(0, 3).keys
    blocks = [*catalog.insert(keys), catalog.attach(path(1, 1).keys[0], path(2, 1).keys[0], depth=4)]

    assert set(catalog.pages()) == {page for block in blocks for page in block.pages}
    assert len(list(catalog.pages())) == 8


def test_a_catalog_can_be_made_anew_from_its_blocks(catalog: Catalog) -> None:
    keys = path(0, 3).keys
    blocks = known(catalog, keys)
    stray = catalog.attach(path(1, 1).keys[0], path(2, 1).keys[0], depth=1)
    catalog.tree.prune(keys[2])  # as an interrupt may leave it
    catalog.strays.clear()

    catalog.rebuild([*blocks, stray])

    assert catalog.match(keys) == blocks
    assert (len(catalog.strays), catalog.get(stray.key)) == (1, stray)
    catalog.tree.check()
