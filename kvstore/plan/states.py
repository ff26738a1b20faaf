"""Pages and states as pairs: each is worth nothing without the other.

A prompt can be resumed after N tokens with the pages of all blocks before N and the state after exactly N. So

    a state of which a piece has left     is no state: its other pieces leave host memory with it
    pages behind the deepest state        are worth only what a later state makes of them: as soon as no state behind
                                          them is left anywhere, they leave next, in every tier
    a state that a path has passed        is no resume point of its next turn: a use refreshes the deepest one only
    what lies behind a page that is gone  cannot be resumed from: it leaves next, in every tier

The third is how older states of a conversation make room by themselves, while those at which prompts part are loaded,
and stay. With a policy that keeps the order of a path the fourth hardly happens: a state is older than its pages.

Models without states never come here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.plan.catalog import Catalog
from kvstore.plan.state import Block, Page, PageState

MAX_BELOW = 4096  # blocks that are looked at behind one that lost its state, or a page; what is beyond is left as it is


def has_state(block: Block, num_groups: int) -> bool:
    """True if a piece of a state after this block is anywhere, or under way. num_groups: pages of every block."""
    return any([page.state or page.homes or page.spilling for page in block.pages[num_groups:]])


def refreshed(blocks: Sequence[Block], catalog: Catalog) -> list[Page]:
    """The pages that a use of a path refreshes, tail first: all but the states before the deepest."""
    if catalog.num_all_groups == catalog.num_groups:
        return [page for block in reversed(blocks) for page in block.pages]
    return list(_without_passed(blocks, catalog.num_groups))


def _without_passed(blocks: Sequence[Block], num_groups: int) -> Iterator[Page]:
    is_deepest = True
    for block in reversed(blocks):
        if len(block.pages) == num_groups:
            yield from block.pages
        elif is_deepest and has_state(block, num_groups):
            is_deepest = False
            yield from reversed(block.pages)
        else:
            yield from block.pages[:num_groups]


def whole_states(victims: Sequence[Page], num_groups: int) -> list[Page]:
    """Add to pages that leave host memory the other pieces of their states, as far as nobody uses those."""
    whole = dict.fromkeys(victims)
    for page in victims:
        if page.group >= num_groups:
            whole |= dict.fromkeys(
                other
                for other in page.block.pages[num_groups:]
                if other.state is PageState.READY and not other.pins and not other.spilling
            )
    return list(whole)


def behind(catalog: Catalog, block: Block) -> list[Block]:
    """The blocks behind one of which a page is gone from everywhere, nearest first; none if it has all of its pages."""
    tree = catalog.tree
    if block.key not in tree or all([page.state or page.homes for page in block.pages[: catalog.num_groups]]):
        return []
    found: list[Block] = []
    ahead = tree.children(block.key)
    while ahead and len(found) < MAX_BELOW:
        below = tree.get(ahead.pop())
        if below is not None:
            found.append(below)
            ahead += tree.children(below.key)
    return found


def stranded(catalog: Catalog, block: Block) -> list[Block]:
    """The blocks, root first, that no state makes use of since that of `block` is gone; none if it is not."""
    num_groups, tree = catalog.num_groups, catalog.tree
    if block.key not in tree or has_state(block, num_groups):
        return []
    tail = [block]
    while children := tree.children(tail[-1].key):
        below = tree.get(children[0])
        if below is None or len(children) > 1 or len(tail) > MAX_BELOW or has_state(below, num_groups):
            return []  # prompts part there, or go on to a state
        tail.append(below)
    head: list[Block] = []
    above = block.parent
    while above is not None and len(tree.children(above.key)) == 1 and not has_state(above, num_groups):
        head.append(above)
        above = above.parent
    return [*reversed(head), *tail]
