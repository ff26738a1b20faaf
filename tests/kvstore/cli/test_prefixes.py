from __future__ import annotations

import hashlib
import random

from kvstore.cli.prefixes import find_trunks
from kvstore.page import PageMeta, page_key
from kvstore.tiers.base import StoredPage

PAGE_BYTES = 100


def path(*words: str, groups: int = 1) -> list[StoredPage]:
    """The pages of a prompt whose blocks are named by words."""
    parent = b""
    pages = []
    for depth, word in enumerate(words):
        block = hashlib.sha256(parent + word.encode()).digest()
        pages += [StoredPage(page_key(block, group), PageMeta(PAGE_BYTES, parent, depth)) for group in range(groups)]
        parent = block
    return pages


def merged(*paths: list[StoredPage]) -> list[StoredPage]:
    return list({page.key: page for pages in paths for page in pages}.values())


def test_prompts_with_a_common_beginning_are_one_trunk() -> None:
    pages = merged(path("a", "b", "c"), path("a", "b", "d", "e"))

    (trunk,) = find_trunks(pages)

    assert (trunk.shared_blocks, trunk.branches, trunk.longest) == (2, 2, 4)
    assert (trunk.pages, trunk.num_bytes) == (5, 5 * PAGE_BYTES)
    assert trunk.root == hashlib.sha256(b"a").hexdigest()
    assert trunk.depth == 0


def test_trunks_come_with_the_most_bytes_first() -> None:
    trunks = find_trunks(merged(path("x"), path("a", "b", "c"), path("m", "n")))

    assert [trunk.pages for trunk in trunks] == [3, 2, 1]


def test_prompt_that_nothing_forks_from_is_shared_to_its_end() -> None:
    (trunk,) = find_trunks(path("a", "b", "c"))

    assert (trunk.shared_blocks, trunk.branches) == (3, 0)


def test_pages_of_all_groups_count_for_one_block() -> None:
    (trunk,) = find_trunks(path("a", "b", groups=3))

    assert (trunk.shared_blocks, trunk.pages, trunk.num_bytes) == (2, 6, 6 * PAGE_BYTES)


def test_blocks_whose_beginning_is_gone_are_a_trunk_of_their_own() -> None:
    (trunk,) = find_trunks(path("a", "b", "c", "d")[2:])

    assert (trunk.depth, trunk.shared_blocks, trunk.longest) == (2, 2, 4)


def test_order_of_the_scan_does_not_matter() -> None:
    pages = merged(path("a", "b", "c"), path("a", "b", "d", "e"), path("x", "y"))
    shuffled = random.Random(0).sample(pages, len(pages))

    assert find_trunks(shuffled) == find_trunks(pages)


def test_record_that_names_itself_as_its_parent_ends_the_walk() -> None:
    block = hashlib.sha256(b"loop").digest()

    (trunk,) = find_trunks([StoredPage(page_key(block), PageMeta(PAGE_BYTES, block, 3))])

    assert (trunk.shared_blocks, trunk.depth) == (1, 3)


def test_nothing_stored_has_no_trunk() -> None:
    assert find_trunks([]) == []
