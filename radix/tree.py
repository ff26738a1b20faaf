"""The prefix index: a value for every known block, found along paths of block hashes.

Blocks that follow each other without a branch share a run (radix.node), so a path of thousands of blocks is a few list
comparisons. Since a block hash names everything before it, a key has one place in the tree, and a dict from key to
place answers what is asked about single blocks. Not thread-safe; called under the store's lock.

The hard thing: runs are cut and joined as branches come and go, and the dict must follow without a step per block in
Python. A place is therefore one number, run * SPAN + depth. Depth never changes, and the places of a run's blocks are
consecutive, so `dict.update(zip(keys, range(...)))` moves a stretch to another run in C; always the shorter side moves.

Tried, 750,000 blocks in 2,000 paths of 500 (ns per block; bytes per block without key and value):

                                                   match  extend  prune  get  bytes
    this one                                          20     400    370  310    106
    dict key -> run, a dict key -> value per run      28     340    390  250    107   children, parent: walk the run
    an object per block, no runs                     150     740    200  130    121   a million objects for the gc
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, count
from operator import ne
from typing import Generic, NamedTuple, TypeVar

from radix import soundness
from radix.namespace import BlockHash
from radix.node import DEPTH, DEPTH_BITS, LONGEST, SPAN, Run
from radix.ordered import OrderedMap

V = TypeVar("V")


class RunView(NamedTuple):
    """A run as `runs` shows it: blocks before it, its keys, and how many runs continue it."""

    depth: int
    keys: tuple[BlockHash, ...]
    num_children: int


@dataclass(frozen=True, slots=True)
class Stretch(Generic[V]):
    """Blocks that follow each other without a branch, and the blocks that continue them."""

    keys: list[BlockHash]
    values: list[V]
    children: list[BlockHash]


class RadixTree(Generic[V]):
    """Values along paths of block hashes, prefix-closed: a block is known only with all blocks before it."""

    __slots__ = ("_next_base", "_places", "_root", "_runs")

    def __init__(self) -> None:
        self._root: Run[V] = Run(0, 0, [], [], None)
        self._runs: OrderedMap[int, Run[V]] = OrderedMap()  # by number
        self._runs[0] = self._root
        self._places: OrderedMap[BlockHash, int] = OrderedMap()  # run number * SPAN + depth
        self._next_base = SPAN

    # ---- along a path ----

    def match(self, path: Sequence[BlockHash]) -> list[V]:
        """Return the values of the longest known prefix of `path`, root first."""
        values: list[V] = []
        for run, shared in self._walk(path):
            values += run.values if shared == len(run.values) else run.values[:shared]
        return values

    def match_from(self, path: Sequence[BlockHash], depth: int, end: int) -> list[V]:
        """Return the values of what is known of `path[depth:end]`, from its first block on, in O(answer).

        Blocks before `depth` are known, which the caller has seen to. Raises KeyError if the last of them is not.
        """
        if not depth:
            run, at = self._root, 0
        else:
            run, at = self._find(path[depth - 1])
            at += 1
        values: list[V] = []
        while depth < end:
            ahead = run.keys[at : at + end - depth]
            wanted = path[depth : depth + len(ahead)]
            if ahead != wanted:
                num = next(compress(count(), map(ne, ahead, wanted)))
                return values + run.values[at : at + num]
            values += run.values[at : at + len(ahead)]
            depth += len(ahead)
            if depth == end:
                break
            below = run.children.get(path[depth])
            if below is None:
                break
            run, at = below, 0
        return values

    def depth(self, path: Sequence[BlockHash]) -> int:
        """Return how many blocks of `path` are known, from its first on."""
        return sum(shared for _, shared in self._walk(path))

    def insert(self, path: Sequence[BlockHash], values: Sequence[V]) -> int:
        """Make all of `path` known; return how many blocks of it were known before.

        values: parallel to path; those of blocks known before are not used.
        """
        depth = self.depth(path)
        self.extend(path, depth, values[depth:])
        return depth

    def extend(self, path: Sequence[BlockHash], depth: int, values: Sequence[V]) -> None:
        """Attach `path[depth:]` with its `values` below `path[:depth]`, which the caller has matched.

        Raises ValueError, changing nothing, if `depth` is not how much of `path` is known.
        """
        parent = path[depth - 1] if 0 < depth <= len(path) else None
        if parent is not None and self._places.get(parent, DEPTH) & DEPTH != depth - 1:
            raise ValueError(f"depth is {depth}, but block {depth - 1} of the path is not known there; match first")
        if not 0 <= depth <= len(path):
            raise ValueError(f"depth is {depth}; it must be in [0, {len(path)}], the length of the path")
        self.attach(parent, path[depth:], values)

    def attach(self, parent: BlockHash | None, keys: Sequence[BlockHash], values: Sequence[V]) -> None:
        """Add `keys`, each continuing the one before it, the first continuing `parent` (None: the root).

        Raises KeyError if `parent` is not known, ValueError if one of the keys is; nothing is changed then.
        """
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys but {len(values)} values; they must be parallel")
        if any(map(self._places.__contains__, keys)):
            known = next(key for key in keys if key in self._places)
            raise ValueError(f"block {known.hex()} is known already, at depth {self._places[known] & DEPTH}")
        if len(keys) > 1 and len(set(keys)) < len(keys):
            raise ValueError("keys has a block twice; a path cannot pass through a block again")
        if not keys:
            return
        run = self._root if parent is None else self._cut_after(parent)
        room = 0
        if run is not self._root and not run.children:
            room = LONGEST - len(run.keys)
            ahead, start = keys[:room], run.base + run.end
            run.keys += ahead
            run.values += values[:room]
            self._places.update(zip(ahead, range(start, start + len(ahead)), strict=True))
        for at in range(room, len(keys), LONGEST):
            end = at + LONGEST
            below: Run[V] = Run(self._new_base(), run.end, list(keys[at:end]), list(values[at:end]), run)
            self._runs[below.base >> DEPTH_BITS] = below
            run.children[keys[at]] = below
            self._place(below)
            run = below

    # ---- one block ----

    def get(self, key: BlockHash) -> V | None:
        """Return the value of a block, None if it is not known. O(1)."""
        place = self._places.get(key)
        if place is None:
            return None
        run = self._runs[place >> DEPTH_BITS]
        return run.values[(place & DEPTH) - run.depth]

    def parent(self, key: BlockHash) -> BlockHash | None:
        """Return the block before this one, None for a first block. O(1). Raises KeyError if `key` is not known."""
        run, at = self._find(key)
        if at:
            return run.keys[at - 1]
        assert run.parent is not None
        return run.parent.keys[-1] if run.parent.keys else None

    def children(self, key: BlockHash | None) -> list[BlockHash]:
        """Return the blocks that continue this one, or the first blocks for None. O(answer).

        Raises KeyError if `key` is not known.
        """
        if key is None:
            return list(self._root.children)
        run, at = self._find(key)
        return [run.keys[at + 1]] if at + 1 < len(run.keys) else list(run.children)

    def stretch(self, key: BlockHash, limit: int) -> Stretch[V]:
        """Return this block and what follows it up to the next branch, at most `limit` blocks. O(answer).

        Raises KeyError if `key` is not known.
        """
        run, at = self._find(key)
        end = min(at + limit, len(run.keys))
        children = [run.keys[end]] if end < len(run.keys) else list(run.children)
        return Stretch(run.keys[at:end], run.values[at:end], children)

    def path(self, key: BlockHash) -> list[BlockHash]:
        """Return the path that ends with this block, root first. Raises KeyError if `key` is not known."""
        run, at = self._find(key)
        stretches = [run.keys[: at + 1]]
        while run.parent is not None:
            run = run.parent
            stretches.append(run.keys)
        return [hash_ for keys in reversed(stretches) for hash_ in keys]

    def prune(self, key: BlockHash) -> bool:
        """Remove this block if nothing continues it; False if something does or it is not known. O(1)."""
        place = self._places.get(key)
        if place is None:
            return False
        run = self._runs[place >> DEPTH_BITS]
        if run.children or run.keys[-1] != key:
            return False
        del self._places[key]
        run.keys.pop()
        run.values.pop()
        if not run.keys:
            self._unlink(run, key)
        return True

    def remove(self, key: BlockHash) -> list[V]:
        """Remove this block and all that continues it; return their values, each after those it continued.

        Empty if `key` is not known. O(answer).
        """
        if key not in self._places:
            return []
        run, at = self._find(key)
        values: list[V] = []
        gone = [run.keys[at:]]
        values += run.values[at:]
        stack = list(run.children.values())
        while stack:
            below = stack.pop()
            values += below.values
            gone.append(below.keys)
            stack += below.children.values()
            del self._runs[below.base >> DEPTH_BITS]
        for keys in gone:
            for removed in keys:
                del self._places[removed]
        run.children = {}
        del run.keys[at:], run.values[at:]
        if not run.keys:
            self._unlink(run, key)
        return values

    def trim(self, key: BlockHash, limit: int) -> list[V]:
        """Remove up to `limit` blocks of what `remove` would, the deepest of a branch first, so this block as the last.

        Returns their values, each after those it continued; empty when nothing is left. O(limit + branches).
        """
        gone: list[list[V]] = []
        while limit > 0 and key in self._places:
            run, at = self._find(key)
            while run.children:
                run, at = next(reversed(run.children.values())), 0
            at = max(at, len(run.keys) - limit)
            limit -= len(run.keys) - at
            gone.append(run.values[at:])
            for removed in run.keys[at:]:
                del self._places[removed]
            first = run.keys[0]
            del run.keys[at:], run.values[at:]
            if not run.keys:
                self._unlink(run, first)
        return [value for values in reversed(gone) for value in values]

    # ---- the whole ----

    def runs(self) -> Iterator[RunView]:
        """Yield every run, each after the one it continues; for pictures. The tree must not change meanwhile."""
        stack = list(reversed(self._root.children.values()))
        while stack:
            run = stack.pop()
            yield RunView(run.depth, tuple(run.keys), len(run.children))
            stack += reversed(run.children.values())

    def check(self) -> None:
        """Assert that runs and places agree. O(blocks); for tests."""
        soundness.check(self._root, self._runs, self._places)

    def values(self) -> list[V]:
        """Return every value, in no order; of a tree that is not sound, those that are left."""
        return [value for run in self._runs.values() for value in run.values]

    def is_sound(self) -> bool:
        """False if an exception in the middle of a change has left it half done. O(runs); `check` is O(blocks)."""
        return soundness.is_sound(self._root, self._runs, self._places)

    def clear(self) -> None:
        """Forget everything."""
        for run in self._runs.values():
            run.parent = None  # else a run and its child would keep each other: the collector does not see them
            run.children = {}
        root: Run[V] = Run(0, 0, [], [], None)
        runs: OrderedMap[int, Run[V]] = OrderedMap()
        runs[0] = root
        self._root, self._runs, self._places = root, runs, OrderedMap()  # at once, whatever interrupts

    def __len__(self) -> int:
        """Known blocks."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __del__(self) -> None:
        self.clear()

    # ---- runs ----

    def _walk(self, path: Sequence[BlockHash]) -> Iterator[tuple[Run[V], int]]:
        """Yield the runs along `path` and how many of their blocks are in it; all but the last are in it whole."""
        path = path if isinstance(path, list) else list(path)
        run, depth = self._root, 0
        while depth < len(path):
            below = run.children.get(path[depth])
            if below is None:
                return
            shared = below.shared(path)
            yield below, shared
            if shared < len(below.keys):
                return
            run, depth = below, below.end

    def _find(self, key: BlockHash) -> tuple[Run[V], int]:
        """Return a block's run and its position there."""
        place = self._places[key]
        run = self._runs[place >> DEPTH_BITS]
        return run, (place & DEPTH) - run.depth

    def _cut_after(self, key: BlockHash) -> Run[V]:
        """Return the run that ends with `key`, cutting its run in two where it goes on.

        attach [x] below b:

            [a b c d]        [a b]             upper: a new run
             /     \\          /   \\
           ...     ...     [c d]  [x]          run, shortened: its children need not be told
                           /   \\
                         ...   ...
        """
        run, at = self._find(key)
        at += 1
        if at == len(run.keys):
            return run
        upper: Run[V] = Run(run.base, run.depth, run.keys[:at], run.values[:at], run.parent)
        del run.keys[:at], run.values[:at]
        run.depth += at
        assert run.parent is not None
        run.parent.children[upper.keys[0]] = upper
        upper.children[run.keys[0]] = run
        run.parent = upper
        shorter = upper if at <= len(run.keys) else run  # the longer keeps the number that both still have
        shorter.base = self._new_base()
        for half in (upper, run):
            self._runs[half.base >> DEPTH_BITS] = half
        self._place(shorter)
        return upper

    def _unlink(self, run: Run[V], first: BlockHash) -> None:
        """Take a run that has lost its blocks and children off its parent; `first` was its first key."""
        above = run.parent
        assert above is not None
        del above.children[first]
        del self._runs[run.base >> DEPTH_BITS]
        if len(above.children) == 1 and above is not self._root:
            (last,) = above.children.values()
            if len(above.keys) + len(last.keys) <= LONGEST:
                self._join(above)

    def _join(self, upper: Run[V]) -> None:
        """Merge a run with its only child.

        [a b]
          |       ->   [a b c d]      the child, lengthened: its children need not be told
        [c d]
        """
        (run,) = upper.children.values()
        assert upper.parent is not None
        shorter, longer = (upper, run) if len(upper.keys) <= len(run.keys) else (run, upper)
        del self._runs[shorter.base >> DEPTH_BITS]
        shorter.base = longer.base
        self._place(shorter)
        run.base = longer.base
        run.depth = upper.depth
        run.keys[:0] = upper.keys
        run.values[:0] = upper.values
        run.parent = upper.parent
        upper.parent.children[run.keys[0]] = run
        self._runs[run.base >> DEPTH_BITS] = run

    def _place(self, run: Run[V]) -> None:
        """Enter where the blocks of a run are."""
        start = run.base + run.depth
        self._places.update(zip(run.keys, range(start, start + len(run.keys)), strict=True))

    def _new_base(self) -> int:
        base = self._next_base
        self._next_base += SPAN
        return base
