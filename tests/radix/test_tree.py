from __future__ import annotations

import random

import pytest

from radix.namespace import BlockHash
from radix.node import LONGEST
from radix.tree import RadixTree, Stretch


def path(text: str) -> list[BlockHash]:
    """A path with one block per letter; like a chain of hashes, a key names all letters before it."""
    return [BlockHash(text[: i + 1].encode()) for i in range(len(text))]


def key(text: str) -> BlockHash:
    """The key of the last letter of `text`."""
    return BlockHash(text.encode())


def tree_of(*texts: str) -> RadixTree[str]:
    """A tree in which the value of a block is the text up to it."""
    tree: RadixTree[str] = RadixTree()
    for text in texts:
        tree.insert(path(text), values(text))
    tree.check()
    return tree


def values(text: str) -> list[str]:
    return [text[: i + 1] for i in range(len(text))]


def shape(tree: RadixTree[str]) -> list[tuple[int, str, int]]:
    """(depth, letters of the run, number of children) of every run."""
    tree.check()
    return [
        (run.depth, "".join(chr(hash_[-1]) for hash_ in run.keys), run.num_children)
        for run in sorted(tree.runs(), key=lambda run: run.keys)
    ]


class TestMatch:
    def test_an_empty_tree_matches_nothing(self) -> None:
        tree: RadixTree[str] = RadixTree()

        assert tree.match(path("abc")) == []
        assert tree.depth(path("abc")) == 0
        assert len(tree) == 0

    def test_an_empty_path_matches_nothing(self) -> None:
        assert tree_of("abc").match([]) == []

    @pytest.mark.parametrize(
        ("prompt", "known"),
        [("abcd", "abcd"), ("abcdz", "abcd"), ("abc", "abc"), ("abxz", "abx"), ("abz", "ab"), ("z", "")],
    )
    def test_the_longest_known_prefix_is_found(self, prompt: str, known: str) -> None:
        tree = tree_of("abcd", "abxy")

        assert tree.match(path(prompt)) == values(known)
        assert tree.depth(path(prompt)) == len(known)

    def test_a_path_may_be_any_sequence(self) -> None:
        assert tree_of("abc").match(tuple(path("abz"))) == ["a", "ab"]

    def test_equal_keys_need_not_be_the_same_objects(self) -> None:
        copies = [BlockHash(bytes(bytearray(hash_))) for hash_ in path("abcd")]

        assert tree_of("abcd").match(copies) == values("abcd")


class TestInsert:
    def test_blocks_without_a_branch_share_a_run(self) -> None:
        tree = tree_of("ab", "abcd")

        assert shape(tree) == [(0, "abcd", 0)]

    def test_a_branch_inside_a_run_cuts_it(self) -> None:
        tree = tree_of("abcd", "abx")

        assert shape(tree) == [(0, "ab", 2), (2, "cd", 0), (2, "x", 0)]

    def test_a_second_branch_joins_the_first(self) -> None:
        tree = tree_of("abcd", "abx", "aby")

        assert shape(tree) == [(0, "ab", 3), (2, "cd", 0), (2, "x", 0), (2, "y", 0)]

    def test_a_cut_run_keeps_its_children(self) -> None:
        tree = tree_of("abcde", "abcdf", "ax")

        assert shape(tree) == [(0, "a", 2), (1, "bcd", 2), (4, "e", 0), (4, "f", 0), (1, "x", 0)]
        assert tree.match(path("abcdf")) == values("abcdf")

    @pytest.mark.parametrize("cut", range(1, 9))
    def test_values_survive_a_cut_anywhere(self, cut: int) -> None:
        whole = "abcdefghi"
        tree = tree_of(whole, whole[:cut] + "x")

        assert tree.match(path(whole)) == values(whole)
        assert [tree.get(hash_) for hash_ in path(whole)] == values(whole)

    def test_first_blocks_are_never_merged_into_the_root(self) -> None:
        assert shape(tree_of("a", "b")) == [(0, "a", 0), (0, "b", 0)]

    def test_insert_tells_what_was_known_and_keeps_its_values(self) -> None:
        tree = tree_of("abc")

        assert tree.insert(path("abxy"), ["new"] * 4) == 2
        assert tree.match(path("abxy")) == ["a", "ab", "new", "new"]
        assert tree.insert(path("ab"), ["new"] * 2) == 2
        assert tree.match(path("ab")) == ["a", "ab"]

    def test_extend_takes_values_of_the_new_blocks_only(self) -> None:
        tree = tree_of("abc")

        tree.extend(path("abcde"), 3, ["4", "5"])

        assert tree.match(path("abcde")) == ["a", "ab", "abc", "4", "5"]

    def test_extend_by_nothing_changes_nothing(self) -> None:
        tree = tree_of("abc")

        tree.extend(path("ab"), 2, [])

        assert shape(tree) == [(0, "abc", 0)]

    def test_attach_below_a_block_inside_a_run(self) -> None:
        tree = tree_of("abcd")

        tree.attach(key("ab"), [key("abx")], ["X"])
        tree.attach(None, [key("z")], ["Z"])

        assert shape(tree) == [(0, "ab", 2), (2, "cd", 0), (2, "x", 0), (0, "z", 0)]
        assert tree.get(key("abx")) == "X"

    def test_the_caller_keeps_its_lists(self) -> None:
        tree: RadixTree[int] = RadixTree()
        keys, numbers = path("ab"), [1, 2]

        tree.attach(None, keys, numbers)
        keys.clear()
        numbers.clear()

        assert tree.match(path("ab")) == [1, 2]
        tree.check()


class TestMisuse:
    """Each refusal leaves the tree as it was."""

    @pytest.mark.parametrize("depth", [0, 1, 4])
    def test_extend_at_another_depth_than_matched_is_refused(self, depth: int) -> None:
        tree = tree_of("abc")
        prompt = path("abcdef")

        with pytest.raises(ValueError, match=r"depth is 4, but block 3|is known already, at depth"):
            tree.extend(prompt, depth, ["?"] * (6 - depth))

        assert shape(tree) == [(0, "abc", 0)]

    @pytest.mark.parametrize("depth", [-1, 7])
    def test_extend_outside_the_path_is_refused(self, depth: int) -> None:
        with pytest.raises(ValueError, match=rf"depth is {depth}; it must be in \[0, 6\]"):
            tree_of("abc").extend(path("abcdef"), depth, [])

    def test_extend_below_a_block_at_another_depth_is_refused(self) -> None:
        tree = tree_of("abc")

        with pytest.raises(ValueError, match="depth is 2, but block 1 of the path is not known there"):
            tree.extend([key("z"), key("abc"), key("q")], 2, ["?"])

    def test_values_that_are_not_parallel_are_refused(self) -> None:
        with pytest.raises(ValueError, match="3 keys but 2 values"):
            tree_of("abc").extend(path("xyz"), 0, ["x", "y"])

    def test_a_known_block_cannot_be_attached_elsewhere(self) -> None:
        tree = tree_of("abc", "abx")

        with pytest.raises(ValueError, match=f"block {key('ab').hex()} is known already, at depth 1"):
            tree.attach(key("abx"), [key("new"), key("ab")], ["?", "?"])

        assert shape(tree) == [(0, "ab", 2), (2, "c", 0), (2, "x", 0)]

    def test_a_path_through_one_block_twice_is_refused(self) -> None:
        tree = tree_of("abc")

        with pytest.raises(ValueError, match="keys has a block twice"):
            tree.attach(key("a"), [key("x"), key("y"), key("x")], ["?"] * 3)

        assert shape(tree) == [(0, "abc", 0)]

    def test_attach_below_an_unknown_block_is_refused(self) -> None:
        tree = tree_of("abc")

        with pytest.raises(KeyError):
            tree.attach(key("z"), [key("zz")], ["?"])

        assert shape(tree) == [(0, "abc", 0)]

    def test_questions_about_an_unknown_block(self) -> None:
        tree = tree_of("abc")

        assert tree.get(key("z")) is None
        assert key("z") not in tree
        assert not tree.prune(key("z"))
        assert tree.remove(key("z")) == []
        for ask in (tree.parent, tree.children, tree.path):
            with pytest.raises(KeyError):
                ask(key("z"))


class TestPrune:
    def test_the_last_block_of_a_path_goes(self) -> None:
        tree = tree_of("abc")

        assert tree.prune(key("abc"))

        assert shape(tree) == [(0, "ab", 0)]
        assert key("abc") not in tree

    def test_a_block_that_something_continues_stays(self) -> None:
        tree = tree_of("abc", "abx")

        assert not tree.prune(key("a"))
        assert not tree.prune(key("ab"))

        assert len(tree) == 4

    def test_the_last_block_of_a_branch_joins_what_it_had_cut(self) -> None:
        tree = tree_of("abcd", "abx")

        assert tree.prune(key("abx"))

        assert shape(tree) == [(0, "abcd", 0)]
        assert tree.match(path("abcd")) == values("abcd")

    def test_a_joined_run_keeps_its_children(self) -> None:
        tree = tree_of("abcde", "abcdf", "ax")

        assert tree.prune(key("ax"))

        assert shape(tree) == [(0, "abcd", 2), (4, "e", 0), (4, "f", 0)]
        assert tree.match(path("abcdf")) == values("abcdf")

    def test_first_blocks_do_not_join_the_root(self) -> None:
        tree = tree_of("ab", "x")

        assert tree.prune(key("x"))

        assert shape(tree) == [(0, "ab", 0)]

    def test_a_path_pruned_from_its_end_leaves_nothing(self) -> None:
        tree = tree_of("abcd", "abxy")

        for text in ("abcd", "abc", "abxy", "abx", "ab", "a"):
            assert tree.prune(key(text))
            tree.check()

        assert len(tree) == 0
        assert shape(tree) == []


class TestRemove:
    def test_a_block_goes_with_all_that_continues_it(self) -> None:
        tree = tree_of("abcd", "abxy", "az")

        removed = tree.remove(key("ab"))

        assert sorted(removed) == ["ab", "abc", "abcd", "abx", "abxy"]
        assert shape(tree) == [(0, "az", 0)]

    def test_values_come_after_those_they_continued(self) -> None:
        tree = tree_of("abcd", "abxy", "abxz")

        removed = tree.remove(key("a"))

        assert all(text == "a" or removed.index(text[:-1]) < removed.index(text) for text in removed)

    def test_removal_inside_a_run_leaves_its_head(self) -> None:
        tree = tree_of("abcde", "abcdf")

        assert sorted(tree.remove(key("abc"))) == ["abc", "abcd", "abcde", "abcdf"]
        assert shape(tree) == [(0, "ab", 0)]

    def test_removal_of_a_branch_joins_what_is_left(self) -> None:
        tree = tree_of("abc", "axyz")

        assert tree.remove(key("ax")) == values("axyz")[1:]
        assert shape(tree) == [(0, "abc", 0)]

    def test_removal_of_a_first_block(self) -> None:
        tree = tree_of("abc", "xyz")

        tree.remove(key("x"))

        assert shape(tree) == [(0, "abc", 0)]


class TestKin:
    def test_children_inside_a_run_at_a_branch_and_at_a_leaf(self) -> None:
        tree = tree_of("abcd", "abxy", "z")

        assert tree.children(None) == [key("a"), key("z")]
        assert tree.children(key("a")) == [key("ab")]
        assert sorted(tree.children(key("ab"))) == [key("abc"), key("abx")]
        assert tree.children(key("abcd")) == []

    def test_parent_inside_a_run_across_runs_and_at_the_root(self) -> None:
        tree = tree_of("abcd", "abxy")

        assert tree.parent(key("abcd")) == key("abc")
        assert tree.parent(key("abx")) == key("ab")
        assert tree.parent(key("a")) is None

    def test_path_leads_from_the_root_to_the_block(self) -> None:
        tree = tree_of("abcd", "abxy")

        assert tree.path(key("abxy")) == path("abxy")
        assert tree.path(key("abc")) == path("abc")
        assert tree.path(key("a")) == path("a")


def test_runs_come_after_the_runs_they_continue() -> None:
    tree = tree_of("abcd", "abxy", "abxz", "q")
    ends = {b""}

    for run in tree.runs():
        assert run.keys[0][:-1] in ends
        ends.add(run.keys[-1])

    assert sum(len(run.keys) for run in tree.runs()) == len(tree)


def test_long_paths_cut_and_joined_at_random_places_stay_right() -> None:
    """Runs of hundreds of blocks, so that either side of a cut is the shorter at times."""
    rng = random.Random(0)
    trunk = path("".join(chr(33 + rng.randrange(90)) for _ in range(300)))
    tree: RadixTree[BlockHash] = RadixTree()
    tree.insert(trunk, trunk)
    branches = []

    for number in range(60):
        cut = rng.randrange(1, 300)
        branch = [*trunk[:cut], *(BlockHash(b"%d/%d" % (number, i)) for i in range(5))]
        tree.insert(branch, branch)
        branches.append(branch)
        tree.check()
    for branch in rng.sample(branches, 60):
        assert tree.match(branch) == branch
        assert len(tree.remove(branch[-5])) == 5
        tree.check()

    assert [len(run.keys) for run in tree.runs()] == [300]
    assert tree.match(trunk) == trunk


def test_a_branch_in_a_long_path_moves_the_blocks_of_one_run_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = [BlockHash(b"%032d" % number) for number in range(5 * LONGEST + 7)]
    tree: RadixTree[BlockHash] = RadixTree()
    for start in range(0, len(trunk), 1000):
        tree.extend(trunk[: start + 1000], start, trunk[start : start + 1000])
    branch = [*trunk[: 2 * LONGEST + LONGEST // 2], BlockHash(b"x" * 32)]
    moved: list[int] = []
    place = RadixTree._place
    monkeypatch.setattr(RadixTree, "_place", lambda tree, run: (moved.append(len(run.keys)), place(tree, run)))

    tree.insert(branch, branch)
    assert tree.match(trunk) == trunk
    assert tree.match(branch) == branch
    tree.check()
    assert tree.prune(branch[-1])

    tree.check()
    assert tree.match(trunk) == trunk
    assert tree.path(trunk[-1]) == trunk
    assert sum(moved) <= LONGEST + 1
    assert tree.remove(trunk[1]) == trunk[1:]
    tree.check()


def test_a_stretch_ends_at_the_next_branch_or_at_the_limit() -> None:
    tree: RadixTree[int] = RadixTree()
    a, b, c, d, x = (BlockHash(bytes([n]) * 32) for n in range(5))
    tree.insert([a, b, c, d], [1, 2, 3, 4])
    tree.insert([a, b, x], [1, 2, 5])

    assert tree.stretch(a, 10) == Stretch([a, b], [1, 2], [c, x])
    assert tree.stretch(b, 10) == Stretch([b], [2], [c, x])
    assert tree.stretch(a, 1) == Stretch([a], [1], [b])
    assert tree.stretch(c, 10) == Stretch([c, d], [3, 4], [])
    with pytest.raises(KeyError):
        tree.stretch(BlockHash(b"?" * 32), 1)
