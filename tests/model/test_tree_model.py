"""The radix tree against a dict: any history of inserts and removals, compared after every step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from radix import node, soundness, tree
from radix.namespace import BlockHash
from radix.tree import RadixTree

# Few letters and short paths, so that paths meet, branch and end inside one another all the time.
texts = st.text("abc", max_size=7)


def path_of(text: str) -> list[BlockHash]:
    """One block per letter; like a chained hash, a key names all letters before it."""
    return [BlockHash(text[: i + 1].encode()) for i in range(len(text))]


class TreeMachine(RuleBasedStateMachine):
    """The model is a dict key -> value in which the parent of a key is the key without its last letter."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[int] = RadixTree()
        self.model: dict[BlockHash, int] = {}
        self.count = 0

    def fresh(self, num: int) -> list[int]:
        self.count += num
        return list(range(self.count - num, self.count))

    def known(self, path: list[BlockHash]) -> list[int]:
        """Values of the longest known prefix."""
        found = []
        for key in path:
            if key not in self.model:
                break
            found.append(self.model[key])
        return found

    def continues(self, key: BlockHash) -> list[BlockHash]:
        return [other for other in self.model if other[:-1] == key]

    @rule(text=texts)
    def insert(self, text: str) -> None:
        path = path_of(text)
        values = self.fresh(len(path))
        depth = len(self.known(path))

        assert self.tree.insert(path, values) == depth

        self.model |= dict(zip(path[depth:], values[depth:], strict=True))

    @rule(text=texts)
    def match_then_extend(self, text: str) -> None:
        path = path_of(text)
        found = self.tree.match(path)
        values = self.fresh(len(path) - len(found))

        self.tree.extend(path, len(found), values)

        assert found == self.known(path)
        self.model |= dict(zip(path[len(found) :], values, strict=True))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), letter=st.sampled_from("abcd"))
    def attach(self, data: st.DataObject, letter: str) -> None:
        parent = data.draw(st.sampled_from(sorted(self.model)))
        key = BlockHash(parent + letter.encode())
        if key in self.model:
            return
        (value,) = self.fresh(1)

        self.tree.attach(parent, [key], [value])

        self.model[key] = value

    @rule(text=texts.filter(bool))
    def prune(self, text: str) -> None:
        key = path_of(text)[-1]
        removable = key in self.model and not self.continues(key)

        assert self.tree.prune(key) == removable

        if removable:
            del self.model[key]

    @rule(text=texts.filter(bool))
    def remove(self, text: str) -> None:
        key = path_of(text)[-1]
        gone = [other for other in self.model if other.startswith(key)]

        removed = self.tree.remove(key)

        assert sorted(removed) == sorted(self.model[other] for other in gone)
        for other in gone:
            del self.model[other]

    @rule(text=texts.filter(bool), limit=st.integers(1, 5))
    def trim(self, text: str, limit: int) -> None:
        key = path_of(text)[-1]
        below = {other: value for other, value in self.model.items() if other.startswith(key)}

        removed = self.tree.trim(key, limit)

        assert len(removed) == min(limit, len(below))
        gone = [next(other for other, value in below.items() if value == each) for each in removed]
        for at, other in enumerate(gone):
            assert not any(other.startswith(later) for later in gone[at + 1 :]), "each after those that it continued"
            del self.model[other]
        for other in gone:
            assert not any(left.startswith(other) for left in self.model), "what continued it is gone as well"

    @rule(text=texts)
    def match(self, text: str) -> None:
        assert self.tree.match(path_of(text)) == self.known(path_of(text))
        assert self.tree.depth(path_of(text)) == len(self.known(path_of(text)))

    @invariant()
    def same_blocks(self) -> None:
        self.tree.check()
        assert len(self.tree) == len(self.model)
        for key, value in self.model.items():
            assert key in self.tree
            assert self.tree.get(key) == value
            assert self.tree.parent(key) == (key[:-1] or None)
            assert sorted(self.tree.children(key)) == sorted(self.continues(key))
            assert self.tree.path(key) == path_of(key.decode())
        assert sorted(self.tree.children(None)) == sorted(key for key in self.model if len(key) == 1)

    @invariant()
    def runs_are_as_long_as_can_be(self) -> None:
        """The number of runs follows from the model: one per first block and one per child of a branching block."""
        starts = [key for key in self.model if len(key) == 1 or len(self.continues(BlockHash(key[:-1]))) > 1]

        assert sorted(run.keys[0] for run in self.tree.runs()) == sorted(starts)
        for run in self.tree.runs():
            assert run.depth == len(run.keys[0]) - 1
            assert run.num_children == len(self.continues(run.keys[-1]))


TestTreeModel = TreeMachine.TestCase
TestTreeModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class ShortRuns(TreeMachine):
    """The same where a run has at most three blocks, so that most paths are longer than one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module in (node, soundness, tree):
            self.patch.setattr(module, "LONGEST", 3)

    @invariant()
    def runs_are_as_long_as_can_be(self) -> None:
        assert all(0 < len(run.keys) <= 3 for run in self.tree.runs())
        assert soundness.is_sound(self.tree._root, self.tree._runs, self.tree._places)

    def teardown(self) -> None:
        self.patch.undo()


TestShortRuns = ShortRuns.TestCase
TestShortRuns.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
